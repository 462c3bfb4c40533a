"""Cache on disk: entries are named by a hash of their inputs and appear atomically, so none is stale or incomplete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmkit.data.progress import Step
from llmkit.errors import Problem, UserError, note

CONTENTS = "contents.json"  # in each entry: sizes and checksums of its other files
MAPPED = ".bin"  # suffix of arrays that are mapped and may be large: only their size is checked
QUICK = 2**26  # bytes; hashing a smaller file takes too little time to show progress
DAY = 24 * 3600  # seconds
_own: list[tempfile.TemporaryDirectory[str]] = []  # entries without a key


def root(cache_dir: str | None) -> Path:
    """Return the cache folder: the argument, else $LLMKIT_CACHE, else ~/.cache/llmkit. Raises UserError for a file."""
    folder = Path(cache_dir or os.environ.get("LLMKIT_CACHE") or "~/.cache/llmkit").expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(Problem("data.cache_dir", f"{folder} is a file, not a folder"))
    return folder


def digest(value: Any) -> str:
    """Return the hash of JSON-able data, whatever the order of dictionary keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: str | Path, folder: Path) -> str:
    """Return the hash of a file's content, stored in ``folder`` under the file's path, inode, size and times."""
    info = os.stat(path)
    changed = max(info.st_mtime_ns, info.st_ctime_ns)
    memo = folder / "files" / digest([os.path.realpath(path), info.st_ino, info.st_size, info.st_mtime_ns, changed])
    try:
        return memo.read_text()
    except (OSError, ValueError):
        step = Step(f"hashing {path}") if info.st_size > QUICK else nullcontext()
        with step, open(path, "rb") as file:
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


def entry(folder: Path, key: str | None, write: Callable[[Path], None]) -> Path:
    """Return the folder of an entry; if it is missing or damaged, ``write`` first fills a new one.

    Several processes may do so at once: the first one wins, the others delete their copy. Without a key the folder is
    this process's own, and is deleted when it ends.
    """
    if key is None:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _own.append(tempfile.TemporaryDirectory(prefix=f"{digest(None)}.", dir=folder, ignore_cleanup_errors=True))
        path = Path(_own[-1].name)
        write(path)
        return path
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
