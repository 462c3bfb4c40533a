"""The source files of a model's plugins: their hashes, and what has changed since a checkpoint was written."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from llmkit import registry
from llmkit.data.identity import file_of, imports_of, is_library
from llmkit.errors import note


@functools.cache
def version(name: str) -> str:
    """Return the version of an installed distribution, which is read once: parsing it takes a millisecond."""
    return importlib.metadata.version(name)


def class_paths(tree: Any) -> Iterator[str]:
    """Yield every ``class_path`` in plain data."""
    if isinstance(tree, Mapping):
        if isinstance(tree.get("class_path"), str):
            yield tree["class_path"]
        for value in tree.values():
            yield from class_paths(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from class_paths(value)


def sources(modules: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the source of plugin modules, and of each module of theirs that they import.

    Of an installed plugin these are the modules of its package, of a local one all that are not installed; llmkit's own
    framework is not among them. Files are hashed as they were when the process first asked.
    """
    installed = packages()

    @functools.cache
    def counts(top: str) -> bool:
        if top in sys.stdlib_module_names or top in ("llmkit", "__main__"):
            return False
        file = None if top in installed else file_of(top)
        return file is None or not is_library(file)  # None: a folder without __init__.py

    found: dict[str, str] = {}
    followed: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        file = file_of(name) if name not in followed and counts(name.partition(".")[0]) else None
        if file is None or file.suffix != ".py":
            continue
        followed.add(name)
        module = sys.modules.get(name)
        found[name] = _first_digest(file, module)
        imported = [other for other in imports_of(name, file, module) if counts(other.partition(".")[0])]
        files = {other: file_of(other) for other in imported}
        # A package is imported with each of its modules. What it imports counts where a name is taken from it itself.
        taken = {other.rpartition(".")[0] for other, place in files.items() if place is None}
        for other, place in files.items():
            if place is not None and place.name == "__init__.py" and other not in taken:
                found[other] = _first_digest(place, sys.modules.get(other))
            else:
                left.append(other)
    return dict(sorted(found.items()))


def packages() -> dict[str, str]:
    """Return the top-level packages with installed plugins, and the distribution that each comes with."""
    entries = (entry for family in registry.DEFAULTS for entry in registry.entries(family).values())
    installed = (entry for entry in entries if entry.distribution != "(local)")
    return {re.split("[.:]", entry.target)[0]: entry.distribution for entry in installed}


@functools.cache
def _first_digest(file: Path, module: ModuleType | None) -> str:
    return _digest(file)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def changed(part: Mapping[str, Any]) -> list[str]:
    """Return the modules of a checkpoint's plugins whose source is another one now.

    Those of llmkit itself count only under the version that wrote it: a later one reads older checkpoints alike.
    """
    stored, versions = part.get("sources"), part.get("versions")
    if not isinstance(stored, Mapping) or not isinstance(versions, Mapping):  # written by an older llmkit
        return []
    later = versions.get("llmkit") != version("llmkit")
    own = {top for top, distribution in packages().items() if distribution == "llmkit"}
    found = []
    for name, digest in stored.items():
        file = file_of(str(name))
        if file is not None and not (later and str(name).partition(".")[0] in own) and _digest(file) != digest:
            found.append(str(name))
    return found


def note_changed(part: Mapping[str, Any], where: str) -> None:
    """Note which plugins of a checkpoint have been edited since it was written; on the first process alone."""
    if getattr(rank_zero_only, "rank", None):
        return
    if names := changed(part):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        note(f"the source of {shown} has changed since {where} was written")
