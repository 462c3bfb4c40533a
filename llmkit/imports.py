"""Local modules with plugins, and which classes a config or a checkpoint may name.

Code runs when a class is imported. So a config may name only what is installed or what the user lists in ``imports:``,
and a checkpoint only plugins. Nothing here imports a module to find out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import site
import sys
import urllib.parse
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.errors import Problem, UserError, nearest

imported: set[str] = set()
"""Names of the local modules that the user asked for."""
_places: dict[str, Path] = {}
"""The top-level modules that came with them, and the folder of each."""


def import_modules(names: Any, folder: str | Path = ".") -> list[str]:
    """Import local plugin modules and return their names, with file paths made absolute.

    Args:
        names: module names, or paths of ``.py`` files (relative to ``folder``); one, a list of them, or None.
        folder: where relative paths and top-level modules are looked for.

    Raises:
        UserError: no such file or module, or an import that fails.
    """
    if not isinstance(names, str | list | None):
        raise UserError(Problem("imports", f"expected a module or a list of modules, got {names!r}"))
    listed = map(str, [names] if isinstance(names, str) else names or [])
    absolute = [str((Path(folder) / name).resolve()) if name.endswith(".py") else name for name in listed]
    check_distinct(absolute)
    for name in absolute:
        if name.endswith(".py"):
            _import(Path(name).stem, Path(name).parent, Path(name))
        else:
            _import(name, Path(folder).resolve(), None)
    return absolute


def _import(module: str, folder: Path, file: Path | None) -> None:
    """Import a module that is looked for in a folder first; it is that of ``file``, if one is given."""
    if file is not None and not file.is_file():
        hint = nearest(file.name, [path.name for path in folder.glob("*.py")])
        raise UserError(Problem("imports", f"{file} does not exist.{hint}"))
    # Imported under a real name, so that worker processes and pickles find the module again.
    _leave_other_folders(module, folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if place != str(folder))]
    before = set(sys.modules)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        hint = "." + nearest(module, [found.name for found in pkgutil.iter_modules()]) if missing else ""
        raise UserError(Problem("imports", f"{file or module} cannot be imported: {cause}{hint}")) from error
    imported.add(module)
    for new in [new for new in sys.modules if new not in before and "." not in new]:
        source = getattr(sys.modules[new], "__file__", None)
        if source and folder in Path(source).resolve().parents[:2]:
            _places[new] = folder
    origin = getattr(loaded, "__file__", None)
    if file is not None and Path(origin or "").resolve() != file:
        raise _taken(file, origin)


def _leave_other_folders(module: str, folder: Path) -> None:
    """Forget another folder's module of this name, and helpers of its modules that ``folder`` has as well.

    Otherwise ``import helpers`` in a file here would silently get the ``helpers.py`` there.
    """
    for name in [name for name, place in _places.items() if place != folder]:
        if name != module and name in imported:
            continue
        if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file():
            for part in [part for part in sys.modules if part == name or part.startswith(f"{name}.")]:
                del sys.modules[part]
            imported.discard(name)
            del _places[name]
            registry.forget(name)


def check_distinct(names: Iterable[str]) -> None:
    """Raise UserError for two files of one name, which Python cannot tell apart: for one run's imports together."""
    first: dict[str, Path] = {}
    for file in [Path(name) for name in names if name.endswith(".py")]:
        if first.setdefault(file.stem, file) != file:
            raise _taken(file, first[file.stem])


def _taken(file: Path, other: object) -> UserError:
    text = f"{file}: another module is already called '{file.stem}' ({other}); rename the file"
    return UserError(Problem("imports", text))


def is_plugin(class_path: str) -> bool:
    """Return whether a checkpoint may name a class: one of a package with plugins, or of what the user imported."""
    plugins = {entry.class_path for family in registry.DEFAULTS for entry in registry.entries(family).values()}
    if class_path in plugins:  # registered by the user's own script, perhaps, which is ``__main__``
        return True
    tops = {name.partition(".")[0] for name in (*plugins, *imported)}
    ours = class_path.startswith(("llmkit.", "torch.optim."))
    return not _runs(class_path) and (ours or class_path.partition(".")[0] in tops)


def refusal(class_path: str) -> str:
    """Return why a config may not name a class; an empty string if it may."""
    top = class_path.partition(".")[0]
    if is_plugin(class_path) or (not _runs(class_path) and (top == "lightning" or _is_installed(top))):
        return ""
    if _runs(class_path):
        return f"{class_path[:200]}: modules whose names begin with '__' cannot be named"
    return (
        f"{class_path[:200]}: module '{top}' is neither installed nor listed in imports:. "
        "A local file must be named: --imports FILE.py, or 'imports:' in the config"
    )


def _runs(class_path: str) -> bool:
    """Return whether it is in a ``__main__`` module, which does its work when it is imported."""
    return any(part.startswith("__") for part in class_path.split("."))


def spec_of(top: str) -> ModuleSpec | None:
    """Return where a top-level module would be imported from; None: it cannot be found."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


@functools.cache
def _is_installed(top: str) -> bool:
    """Return whether a top-level module comes from an installed distribution. The standard library does not."""
    spec = spec_of(top) if top.isidentifier() and top not in sys.stdlib_module_names else None
    if spec is None:
        return False
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or [spec.origin or ""]) if place]
    return bool(places) and all(any(place.is_relative_to(root) for root in _installs(top)) for place in places)


def _installs(top: str) -> Iterator[Path]:
    """Yield the folders of installed packages, then those of editable installs that provide a top-level module."""
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        yield Path(folder).resolve()
    for name in importlib.metadata.packages_distributions().get(top, []):
        origin = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield Path(urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)).resolve()
