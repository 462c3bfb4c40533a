"""What importing a plugin would show, read from its source: importing torch for a list would take seconds."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from llmkit.registry import CONTRACTS, Entry

OWN = "llmkit"
SEEN = {"abc", "builtins", "torch", "typing"}
"""Packages whose classes a plugin may derive from beside its contract without anything being left to find out."""


class Doubt(Exception):  # noqa: N818
    """Reading does not tell what importing would do."""


class Found(NamedTuple):
    """Where a class is, and what its docstring says."""

    doc: str
    file: Path | None
    line: int | None


@dataclass(frozen=True)
class Module:
    """A module as it is written."""

    name: str
    file: Path
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here -> module, and the name there (empty: it is the module itself)."""
    imports: set[str] = field(default_factory=set)
    """Modules."""


def read(entry: Entry) -> Found | None:
    """Return what is known of a plugin that importing would show to be sound; None where only importing can tell.

    Sound is: it and the modules of its package that it imports hold nothing but definitions and assignments, what they
    import is installed, and the class derives from its contract and defines what is abstract there.
    """
    name, _, class_name = entry.target.partition(":")
    try:
        _check(name, set())
        module, node = _class(name, class_name)
        lineage = _lineage(module, node)
    except Doubt:
        return None
    if CONTRACTS[entry.family] not in [f"{above.name}:{it.name}" for above, it in lineage] or _abstract(lineage):
        return None
    return Found(ast.get_docstring(node, clean=False) or "", module.file, node.lineno)


def forget() -> None:
    """Forget the files that were read: they may have changed."""
    _spec.cache_clear()
    _module.cache_clear()


@functools.cache
def _spec(name: str) -> tuple[str | None, list[str] | None]:
    """Return a module's file and, of a package, where its modules are; it is found, but not imported.

    Raises Doubt when there is no such module.
    """
    parent, _, last = name.rpartition(".")
    try:
        spec = PathFinder.find_spec(name, _spec(parent)[1] or []) if parent else find_spec(last)
    except (ImportError, ValueError) as error:
        raise Doubt from error
    if spec is None:
        raise Doubt
    places = spec.submodule_search_locations
    return spec.origin, None if places is None else list(places)


@functools.cache
def _module(name: str) -> Module:
    """Return a module as it is written. Raises Doubt when it does more than define and assign."""
    file, places = _spec(name)
    if file is None and places is not None:
        return Module(name, Path())  # a folder without __init__.py
    if file is None or not file.endswith(".py"):
        raise Doubt
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise Doubt from error
    module = Module(name, Path(file))
    package = name if places is not None else name.rpartition(".")[0]
    for node in tree.body:
        match node:
            case ast.ClassDef(decorator_list=[]):
                module.classes[node.name] = node
            case ast.Import():
                for alias in node.names:
                    module.imports.add(alias.name)
                    first = alias.name.partition(".")[0]
                    module.imported[alias.asname or first] = (alias.name if alias.asname else first, "")
            case ast.ImportFrom():
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                source = ".".join(filter(None, [above, node.module]))
                module.imports.add(source)
                module.imported.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Assign() | ast.AnnAssign():
                pass
            case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case _:
                raise Doubt
    return module


def _check(name: str, done: set[str]) -> None:
    """Raise Doubt unless a module, the packages it is in and what they import of its own package hold no surprises."""
    own = name.partition(".")[0]
    while name and name not in done:
        done.add(name)
        module = _module(name)
        for other in module.imports:
            top = other.partition(".")[0]
            if top == own:
                _check(other, done)
            elif top != OWN:
                _spec(top)
        for source, last in module.imported.values():
            if last and source.partition(".")[0] == own and _is_module(f"{source}.{last}"):
                _check(f"{source}.{last}", done)
        name = name.rpartition(".")[0]


def _is_module(name: str) -> bool:
    try:
        return bool(_spec(name))
    except Doubt:
        return False


def _class(name: str, class_name: str) -> tuple[Module, ast.ClassDef]:
    """Return a class and the module it is written in, wherever it is imported from."""
    # ``llmkit`` itself imports the contracts when they are first asked for.
    module = _module("llmkit.contracts" if name == OWN else name)
    if class_name in module.classes:
        return module, module.classes[class_name]
    source, original = module.imported.get(class_name, ("", ""))
    if not source or not original:
        raise Doubt
    return _class(source, original)


def _bases(module: Module, node: ast.ClassDef) -> list[tuple[Module, ast.ClassDef]]:
    """Return the classes that one derives from, but for those of well-known packages."""
    found = []
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        first, *rest = ast.unparse(base).split(".")
        if first in module.classes and not rest:
            found.append((module, module.classes[first]))
            continue
        source, name = module.imported.get(first, ("builtins", first))
        if source.partition(".")[0] in SEEN:
            continue
        path = [source, *filter(None, [name]), *rest]
        found.append(_class(".".join(path[:-1]), path[-1]))
    return found


def _lineage(module: Module, node: ast.ClassDef) -> list[tuple[Module, ast.ClassDef]]:
    """Return a class and those above it, in the order in which names are looked up."""
    found = [(module, node), *(above for base in _bases(module, node) for above in _lineage(*base))]
    return [(where, it) for at, (where, it) in enumerate(found) if all(it is not other for _, other in found[at + 1 :])]


def _abstract(lineage: list[tuple[Module, ast.ClassDef]]) -> set[str]:
    """Return the names that are still abstract."""
    found: dict[str, bool] = {}
    for _, node in reversed(lineage):
        for item in node.body:
            match item:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    marks = {ast.unparse(mark).rpartition(".")[2] for mark in item.decorator_list}
                    found[item.name] = "abstractmethod" in marks
                case ast.Assign():
                    found |= {target.id: False for target in item.targets if isinstance(target, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                    found[name] = False
    return {name for name, abstract in found.items() if abstract}
