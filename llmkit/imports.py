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
import sysconfig
import urllib.parse
from collections.abc import Iterable
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
    listed = [names] if isinstance(names, str) else names or []
    absolute = [str((Path(folder) / str(name)).resolve()) for name in listed if str(name).endswith(".py")]
    check_distinct(absolute)
    return [_import(str(name), Path(folder).resolve()) for name in listed]


def _import(name: str, folder: Path) -> str:
    """Import one module or file and return its absolute name."""
    module, absolute = name, name
    if name.endswith(".py"):
        file = (folder / name).resolve()
        if not file.is_file():
            hint = nearest(file.name, [path.name for path in file.parent.glob("*.py")])
            raise UserError(Problem("imports", f"{file} does not exist.{hint}"))
        folder, module, absolute = file.parent, file.stem, str(file)
    # Imported under a real name, so that worker processes and pickles find the module again.
    _leave_other_folders(module, folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    before = set(sys.modules)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        hint = "." + nearest(module, [found.name for found in pkgutil.iter_modules()]) if missing else ""
        raise UserError(Problem("imports", f"{name} cannot be imported: {cause}{hint}")) from error
    imported.add(module)
    for new in [new for new in sys.modules if new not in before and "." not in new]:
        source = getattr(sys.modules[new], "__file__", None)
        if source and folder in Path(source).resolve().parents[:2]:
            _places[new] = folder
    origin = getattr(loaded, "__file__", None)
    if absolute.endswith(".py") and (origin is None or Path(origin).resolve() != Path(absolute)):
        text = f"{name}: another module is already called '{module}' ({origin}); rename the file"
        raise UserError(Problem("imports", text))
    return absolute


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
    files = [Path(name) for name in dict.fromkeys(names) if name.endswith(".py")]
    first = {file.stem: file for file in reversed(files)}
    for file in files:
        if first[file.stem] != file:
            text = f"{file}: another module is already called '{file.stem}' ({first[file.stem]}); rename the file"
            raise UserError(Problem("imports", text))


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
    if is_plugin(class_path) or (not _runs(class_path) and _is_installed(top)):
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


def is_importable(top: str) -> bool:
    """Return whether a top-level module can be found."""
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _is_installed(top: str) -> bool:
    """Return whether a top-level module comes from an installed distribution. The standard library does not."""
    if not top.isidentifier() or top in sys.stdlib_module_names or not is_importable(top):
        return False
    spec = importlib.util.find_spec(top)
    assert spec is not None
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or [spec.origin or ""]) if place]
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]

    def below(roots: Iterable[Path]) -> bool:
        return bool(places) and all(any(place.is_relative_to(root) for root in roots) for place in places)

    return below([Path(folder).resolve() for folder in folders]) or below(_editable_folders(top))


def _editable_folders(top: str) -> list[Path]:
    """Return the folders of editable installs that provide a top-level module."""
    found = []
    for name in importlib.metadata.packages_distributions().get(top, []):
        origin = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            found.append(Path(urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)).resolve())
    return found
