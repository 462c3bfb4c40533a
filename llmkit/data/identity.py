"""What features depend on, as plain data for the keys of the cache: code, with all that it imports, and settings.

What cannot be described (an open file, a class typed into a shell) makes no key, and what it makes is not kept.
"""

from __future__ import annotations

import ast
import copyreg
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmkit import registry
from llmkit.contracts import Tokenizer
from llmkit.data import cache
from llmkit.errors import note

CORE = Path(__file__).resolve().parents[1]
LIBRARIES = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")})
HIDDEN = {*vars(nn.Module()), "decoding"} - {"_modules", "_buffers"}
"""Attributes that say nothing about features: those of torch, weights among them, and how text is generated."""

_read: dict[str, tuple[Any, str, list[str]]] = {}
"""Module -> its spec, its digest and what it imports, as its file was when the process first asked: a file that is
edited while its code runs has not changed that code."""


class _Undescribed(Exception):  # noqa: N818
    """Something that cannot be described; the text says what."""


def of(owner: object, folder: Path, *values: Any) -> list[Any] | None:
    """Return a description of a plugin, or of ``values`` that belong to it: settings, and the code with all it imports.

    None if something cannot be described; a note says what.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__}
    naming = _Naming(folder, packages - {"torch", "llmkit", *sys.stdlib_module_names})
    try:
        return [platform.python_version(), _own_code(folder), *map(naming.value, values or [owner])]
    except _Undescribed as error:
        _note(f"what {cls.__name__} makes of the data is not kept in the cache: {error}")
        return None


def of_trained(tokenizer: Tokenizer, folder: Path) -> list[Any] | None:
    """Return what the ids of a trained tokenizer depend on: its code, and all that a checkpoint has of it."""
    settings = registry.spec_of_instance(tokenizer)["init_args"]
    return of(tokenizer, folder, type(tokenizer), settings, tokenizer.to_state())


@functools.cache
def _note(text: str) -> None:
    note(text)


@functools.cache
def _own_code(folder: Path) -> list[str]:
    """Return the digests of llmkit's own files that turn rows into features and read them back."""
    files = [CORE / "contracts.py", CORE / "sequence.py", *(CORE / "data").glob("*.py"), *(CORE / "ops").glob("*.py")]
    return [cache.file_digest(file, folder) for file in sorted(files)]


class _Naming:
    """Describes values.

    Args:
        folder: the cache, which remembers the digests of files.
        packages: the installed packages whose files count one by one; of others the version counts.
    """

    def __init__(self, folder: Path, packages: set[str]) -> None:
        self.folder, self.packages = folder, packages
        self.open: list[int] = []  # the values that the present one is part of

    def value(self, value: Any) -> Any:
        """Return a description that is equal for equal values, in every process."""
        if value is None or type(value) in (bool, int, float):
            return repr(value)
        if type(value) is str:
            return [value, *self._file(value)]
        if type(value) in (bytes, bytearray):
            return [type(value).__name__, hashlib.sha256(value).hexdigest()]
        if id(value) in self.open:
            return ["above", len(self.open) - self.open.index(id(value))]
        self.open.append(id(value))
        try:
            return [type(value).__name__, self._parts(value)]
        except RecursionError as error:
            raise _Undescribed("it is nested too deeply") from error
        finally:
            self.open.pop()

    def _parts(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return [self.value(item) for item in value]
        if type(value) is dict:
            return [[self.value(key), self.value(item)] for key, item in value.items()]
        if type(value) in (set, frozenset):
            return sorted(json.dumps(self.value(item)) for item in value)
        if isinstance(value, type):
            return [value.__module__, value.__qualname__, self.code(base.__module__ for base in value.__mro__)]
        if isinstance(value, ModuleType):
            return [value.__name__, self.code([value.__name__])]
        if isinstance(value, FunctionType):
            code, cells = value.__code__, [cell.cell_contents for cell in value.__closure__ or ()]
            place = [value.__module__, value.__qualname__, code.co_firstlineno, code.co_code]
            constants = [item for item in code.co_consts if not isinstance(item, CodeType)]
            kept = [value.__defaults__, value.__kwdefaults__, cells, code.co_names, constants]
            return [self.value([*place, *kept]), self.code([value.__module__])]
        if isinstance(value, nn.Module):
            settings = {name: item for name, item in vars(value).items() if name not in HIDDEN}
            return [self.value(type(value)), self._attributes(settings)]
        try:
            if isinstance(value, Tensor):
                array = value.detach().cpu().contiguous().flatten()
                content = hashlib.sha256(array.view(torch.uint8).numpy().tobytes()).hexdigest()
                return [str(value.dtype), list(value.shape), content]
            reduce = copyreg.dispatch_table.get(type(value))  # how pickle would take it apart
            reduced: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:
            raise _Undescribed(f"{type(error).__name__}: {error}") from error
        if isinstance(reduced, str):
            return [type(value).__module__, reduced]
        make, arguments, state, items, pairs = [*reduced, None, None, None][:5]
        parts = [make, list(arguments), None, list(items or ()), [list(pair) for pair in pairs or ()]]
        return [self._attributes(state) if isinstance(state, dict) else self.value(state), *map(self.value, parts)]

    def _attributes(self, settings: dict[str, Any]) -> list[Any]:
        """Return the attributes of an object, in the order of their names."""
        found = []
        for name, item in sorted(settings.items(), key=lambda pair: str(pair[0])):
            try:
                found.append([str(name), self.value(item)])
            except _Undescribed as error:
                text = str(error)
                raise _Undescribed(text if text.startswith("attribute ") else f"attribute '{name}': {text}") from error
        return found

    def _file(self, text: str) -> list[Any]:
        """Return the content of the file, or the sizes and times of the files of the folder, that a text names."""
        if not text or len(text) > 1000 or "\n" in text or "\0" in text:
            return []
        path = os.path.expanduser(text)
        if os.path.isfile(path):
            return [cache.file_digest(path, self.folder)]
        if os.sep in path and os.path.isdir(path):
            files = sorted((item.name, item.stat()) for item in os.scandir(path) if item.is_file())
            return [[name, info.st_size, info.st_mtime_ns] for name, info in files]
        return []

    def code(self, modules: Iterable[str]) -> list[Any]:
        """Return each file that modules import, in functions too, and the version of each library."""
        found: dict[str, Any] = {}
        begin = list(modules)
        left = list(begin)
        while left:
            name = left.pop()
            top = name.partition(".")[0]
            if name in found or top in sys.builtin_module_names:
                continue
            file = file_of(name)
            if file is None:
                if name in begin and top not in sys.stdlib_module_names:
                    raise _Undescribed(f"there is no file with the code of module '{name}'")
                continue
            if top not in self.packages and (top == "llmkit" or is_library(file)):
                found[top] = str(getattr(sys.modules.get(top), "__version__", None))
                continue
            found[name], imports = self._read(name, file)
            left += imports
        return sorted(found.items())

    def _read(self, name: str, file: Path) -> tuple[str, list[str]]:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None) or module
        known = _read.get(name)
        if known is None or spec is None or known[0] is not spec:
            known = _read[name] = (spec, cache.file_digest(file, self.folder), imports_of(name, file, module))
        return known[1], known[2]


@functools.cache
def is_library(file: Path) -> bool:
    """Return whether a file is installed, here or in an environment that this one builds on."""
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts) or any(map(file.is_relative_to, LIBRARIES))


def file_of(name: str) -> Path | None:
    """Return the file of a module, found without importing anything; None if there is none."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        return _resolved(file) if file else None
    above = sys.modules.get(name.rpartition(".")[0])
    if above is not None and "__path__" not in vars(above):
        return None  # something that a module defines: only packages have modules in them
    top, *rest = name.split(".")
    try:
        spec, path = importlib.util.find_spec(top), top
        for part in rest:
            path = f"{path}.{part}"
            places = spec.submodule_search_locations if spec else None
            spec = importlib.machinery.PathFinder.find_spec(path, places) if places else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).resolve() if spec and spec.has_location and spec.origin else None


@functools.cache
def _resolved(file: str) -> Path:
    """Follow links, once a file: each key of the cache asks for the files of hundreds of modules."""
    return Path(file).resolve()


@functools.cache
def imports_of(name: str, file: Path, module: ModuleType | None) -> list[str]:
    """Return the names of what a module imports that may be modules, and the packages that they are in.

    ``module``: what is imported under its name now; another one may have another file.
    """
    if file.suffix != ".py":
        return []
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return []
    found: dict[str, None] = {}
    for node in _statements(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        for full in names:
            parts = full.split(".")
            found |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return list(found)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements below a node, and not their expressions, which ``ast.walk`` spends most of its time on."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, block, ()):
            yield statement
            yield from _statements(statement)
