"""Cache on disk: entries named by what they were made from, written at once, so that none is stale or half done."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llmkit.errors import note

VERSION = 3  # part of every key: raise it when the format of what is stored changes
CONTENTS = "contents.json"  # in each entry: sizes and checksums of its other files
MAPPED = ".bin"  # arrays that are mapped and may be large: their size alone is compared
DAY = 24 * 3600  # seconds


def root(cache_dir: str | None) -> Path:
    """Return the cache folder: the argument, else $LLMKIT_CACHE, else ~/.cache/llmkit."""
    return Path(cache_dir or os.environ.get("LLMKIT_CACHE") or "~/.cache/llmkit").expanduser()


def digest(value: Any) -> str:
    """Return the hash of JSON-able data; the order of dictionary keys does not count."""
    return hashlib.sha256(json.dumps([VERSION, value], sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: str | Path, folder: Path) -> str:
    """Return the hash of a file's content, remembered in ``folder`` by the file's path, inode, size and times."""
    info = os.stat(path)
    changed = max(info.st_mtime_ns, info.st_ctime_ns)
    memo = folder / "files" / digest([os.path.realpath(path), info.st_ino, info.st_size, info.st_mtime_ns, changed])
    try:
        return memo.read_text()
    except (OSError, ValueError):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    # A file changed a moment ago can change again within the resolution of its times.
    if time.time_ns() - changed > 2e9:
        write_text(memo, found)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def entry(folder: Path, key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of an entry; where it is missing or damaged, ``write`` fills a new one that takes its place.

    Several processes may do so at once: the first one wins, the others throw their copy away.
    """
    path = folder / key
    if path.is_dir():
        damage = _damage(path)
        if damage is None:
            return path
        note(f"the cache entry {path} is damaged ({damage}): it is thrown away and made again")
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
    try:
        write(temporary)
        write_text(temporary / CONTENTS, json.dumps({file.name: _contents(file) for file in temporary.iterdir()}))
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _contents(file: Path) -> list[int]:
    """Return the size of a file and, where it is read as a whole anyway, a checksum."""
    found = [file.stat().st_size]
    if file.suffix != MAPPED:
        found.append(zlib.crc32(file.read_bytes()))
    return found


def _damage(path: Path) -> str | None:
    """Return what is wrong with an entry, if anything is."""
    try:
        for name, expected in json.loads((path / CONTENTS).read_text(encoding="utf-8")).items():
            if _contents(path / name) != expected:
                return f"{name} is not what was written"
    except OSError as error:
        return str(error.strerror)
    except (ValueError, AttributeError):
        return f"{CONTENTS} is not what was written"
    return None


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed a day ago or earlier were writing."""
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}\.\w{8}", path.name):
            try:
                written = max(file.stat().st_mtime for file in [path, *path.iterdir()])
            except OSError:  # another process has just finished it
                continue
            if time.time() - written > DAY:
                shutil.rmtree(path, ignore_errors=True)


def plain(value: Any) -> bool:
    """Whether a value is JSON-able data."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def identity(thing: object, folder: Path) -> list[Any]:
    """Return what the results of a head or tokenizer depend on: its class, the code of the class, its plain settings.

    The code is that of the files which define the class and its bases, so that an edited plugin is not mistaken for
    the one whose results were stored.
    """
    files = set()
    for cls in type(thing).__mro__:
        if cls.__module__.partition(".")[0] not in ("builtins", "abc", "torch", "typing"):
            try:
                files.add(inspect.getsourcefile(cls))
            except (TypeError, OSError):  # a class typed into a shell has no file
                continue
    code = sorted(file_digest(file, folder) for file in files if file and os.path.isfile(file))
    hidden = vars(nn.Module()) if isinstance(thing, nn.Module) else {}
    settings = {name: value for name, value in vars(thing).items() if name not in hidden and plain(value)}
    return [f"{type(thing).__module__}.{type(thing).__qualname__}", code, settings]
