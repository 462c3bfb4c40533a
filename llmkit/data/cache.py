"""Cache on disk: entries are named by a hash of their inputs and appear atomically, so none is stale or incomplete."""

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from llmkit.errors import note

VERSION = 5  # part of every key: raise it when the format of what is stored changes
CONTENTS = "contents.json"  # in each entry: sizes and checksums of its other files
MAPPED = ".bin"  # suffix of arrays that are mapped and may be large: only their size is checked
DAY = 24 * 3600  # seconds


def root(cache_dir: str | None) -> Path:
    """Return the cache folder: the argument, else $LLMKIT_CACHE, else ~/.cache/llmkit."""
    return Path(cache_dir or os.environ.get("LLMKIT_CACHE") or "~/.cache/llmkit").expanduser()


def digest(value: Any) -> str:
    """Return the hash of JSON-able data, whatever the order of dictionary keys."""
    return hashlib.sha256(json.dumps([VERSION, value], sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: str | Path, folder: Path) -> str:
    """Return the hash of a file's content, stored in ``folder`` under the file's path, inode, size and times."""
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
    """Write a file atomically: a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def entry(folder: Path, key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of an entry; if it is missing or damaged, ``write`` first fills a new one.

    Several processes may do so at once: the first one wins, the others delete their copy.
    """
    path = folder / key
    if path.is_dir():
        damage = _damage(path)
        if damage is None:
            return path
        note(f"the cache entry {path} is damaged ({damage}): rebuilding it")
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    with tempfile.TemporaryDirectory(prefix=f"{key}.", dir=folder, ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        write(temporary)
        write_text(temporary / CONTENTS, json.dumps({file.name: _contents(file) for file in temporary.iterdir()}))
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    return path


def _contents(file: Path) -> list[int]:
    """Return the size of a file and, if it is not mapped, a checksum."""
    size = file.stat().st_size
    return [size] if file.suffix == MAPPED else [size, zlib.crc32(file.read_bytes())]


def _damage(path: Path) -> str | None:
    """Return what is wrong with an entry, or None."""
    try:
        for name, expected in json.loads((path / CONTENTS).read_text(encoding="utf-8")).items():
            if _contents(path / name) != expected:
                return f"{name} has changed"
    except OSError as error:
        return str(error.strerror)
    except (ValueError, AttributeError):
        return f"{CONTENTS} has changed"
    return None


def _sweep(folder: Path) -> None:
    """Remove the unfinished entries of processes that were killed, a day after their last write."""
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}\.\w{8}", path.name):
            try:
                written = max(file.stat().st_mtime for file in [path, *path.iterdir()])
            except OSError:  # another process has just finished it
                continue
            if time.time() - written > DAY:
                shutil.rmtree(path, ignore_errors=True)


def identity(thing: object, folder: Path) -> list[Any]:
    """Return what the results of a head or tokenizer depend on: its class, the source code of the class, its settings.

    The code is that of the files which define the class and its bases: after a plugin is edited, results that the
    earlier code stored are not used. Settings are the attributes that are JSON-able.
    """
    files = set()
    for cls in type(thing).__mro__:
        if cls.__module__.partition(".")[0] not in ("builtins", "abc", "torch", "typing"):
            with suppress(TypeError, OSError):  # a class typed into a shell has no file
                files.add(inspect.getsourcefile(cls))
    code = sorted(file_digest(file, folder) for file in files if file and os.path.isfile(file))
    hidden = vars(nn.Module()) if isinstance(thing, nn.Module) else {}
    settings = {name: value for name, value in vars(thing).items() if name not in hidden and _jsonable(value)}
    return [f"{type(thing).__module__}.{type(thing).__qualname__}", code, settings]


def _jsonable(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
