"""Cache on disk: entries named by what they were made from, written at once, so that none is stale or half done."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

VERSION = 1  # part of every key: raise it when the format of what is stored changes


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
    except OSError:
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
    """Return the folder of an entry; where it is missing, ``write`` fills a new folder that then takes its place.

    Several processes may do so at once: the first one wins, the others throw their copy away.
    """
    path = folder / key
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
    try:
        write(temporary)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


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
