"""Imports run one way, and the light modules stay light."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmkit

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "llmkit").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
HEAVY = ["torch", "lightning", "jsonargparse", "yaml", "numpy", "datasets", "tokenizers", "torchmetrics"]


def module_name(path: Path, base: Path = ROOT) -> str:
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: list[str], *, top_level: bool) -> Iterator[str]:
    """Dotted names that code of a package imports; ``top_level``: only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=level):
                parents = package[: len(package) + 1 - level] if level else []
                base = ".".join([*parents, *filter(None, [node.module])])
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if top_level:
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if top_level:
                pass
            case _:
                yield from imports(node, package, top_level=top_level)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path, *, top_level: bool = False) -> set[str]:
    base = ROOT / "plugins" if path.is_relative_to(ROOT / "plugins") else ROOT
    package = list(path.parent.relative_to(base).parts)
    return set(imports(tree_of(path), package, top_level=top_level))


def reaches(names: set[str], *packages: str) -> list[str]:
    return sorted(name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages))


def test_the_framework_knows_no_plugin() -> None:
    for path in CORE:
        assert not reaches(imported(path), "llmkit_plugins"), path
        texts = [node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)]
        assert not [text for text in texts if isinstance(text, str) and text.startswith("llmkit_plugins")], path


ROOMS = (
    *("errors", "lazy", "registry", "imports", "check"),
    *("sequence", "contracts", "compression", "ops", "lightning", "data", "checkpoint", "hf", "model", "interop"),
    "serving",
    *("run", "config", "testing", "study", "analysis", "commands", "api", "main", "__main__"),
)
"""The modules and packages of llmkit from the bottom to the top: each may import itself and what stands before it."""
FOR_PLUGINS = ("contracts", "compression", "sequence", "registry", "errors", "ops")
"""What plugins may import."""


def rooms(names: set[str]) -> set[str]:
    """The rooms of llmkit that imported names lead into; the public names of the package lead into their homes."""
    homes = {f"llmkit.{name}": home for name, home in llmkit._HOMES.items()}
    return {homes.get(name, name).split(".")[1] for name in names if name.startswith("llmkit.")} - {"__version__"}


def test_every_room_has_a_place() -> None:
    found = {path.relative_to(ROOT / "llmkit").parts[0].removesuffix(".py") for path in CORE}
    assert found == {*ROOMS, "__init__"}


def test_rooms_import_what_stands_before_them() -> None:
    """Imports inside functions and for type checkers count too."""
    for path in CORE:
        own = path.relative_to(ROOT / "llmkit").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        before = FOR_PLUGINS if "templates" in path.parts else ROOMS[: ROOMS.index(own) + 1]  # users copy templates
        assert rooms(imported(path)) <= set(before), f"{path} may import {', '.join(before)}"


def test_plugins_import_what_is_made_for_them() -> None:
    for path in PLUGINS:
        names = imported(path)
        assert rooms(names) <= set(FOR_PLUGINS), path
        assert not reaches(names, "lightning", "pytorch_lightning", "jsonargparse"), path


@pytest.mark.parametrize("name", FOR_PLUGINS)
def test_what_plugins_import_needs_no_lightning(name: str) -> None:
    for path in CORE:
        if path.relative_to(ROOT / "llmkit").parts[0].removesuffix(".py") == name:
            assert not reaches(imported(path), "lightning", "pytorch_lightning", "jsonargparse")


def test_modules_import_each_other_in_one_direction() -> None:
    """There is no circle, imports inside functions included."""
    modules = {module_name(path): path for path in CORE if "templates" not in path.parts}
    graph = {name: imported(path) & set(modules) for name, path in modules.items() if name != "llmkit"}
    for name, used in graph.items():
        # `from llmkit.data import cache` inside llmkit.data names the package, which is being imported anyway.
        graph[name] = {other for other in used if not f"{name}.".startswith(f"{other}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_file_is_too_long_to_read() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*CORE, *PLUGINS]}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
    author = ROOT / "llmkit" / "contracts.py"
    assert lengths[str(author)] < 300, "a plugin author reads all of it"


@pytest.mark.parametrize(
    "path", [ROOT / "llmkit" / f"{name}.py" for name in ("__init__", "errors", "main", "registry")]
)
def test_light_modules_import_nothing_heavy_at_the_top(path: Path) -> None:
    assert not reaches(imported(path, top_level=True), *HEAVY)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import llmkit", HEAVY),
        ("import llmkit.registry; llmkit.registry.entries('attention')", [*HEAVY, "llmkit_plugins"]),
        ("import llmkit.main; assert llmkit.main.main(['--help']) == 0", [*HEAVY, "importlib.metadata"]),
        ("import llmkit.contracts", [name for name in HEAVY if name not in ("torch", "numpy")]),
        ("import llmkit_plugins", HEAVY),
        ("import llmkit.study.execute", HEAVY),  # what a lost cell of a study begins with
    ],
)
def test_loaded_modules(code: str, absent: list[str]) -> None:
    code = f"import sys; {code}; print(*[name for name in {absent} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == ""


PRINTING = ("errors", "main", "run.progress", "run.report", "run.shutdown", "study.progress", "commands")
"""Notes, answers of commands, progress, reports and the notice of a shutdown: all that prints."""


def test_nothing_but_reports_prints() -> None:
    calls = [
        f"{path}:{node.lineno}"
        for path in CORE
        if not reaches({module_name(path)}, *(f"llmkit.{name}" for name in PRINTING))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not calls


def test_public_names() -> None:
    assert llmkit.__all__ == sorted(llmkit.__all__)
    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
        assert name in dir(llmkit)
    with pytest.raises(AttributeError, match="no attribute 'Attenton'"):
        llmkit.Attenton  # noqa: B018


def test_public_names_are_what_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "llmkit" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {*homes, "__version__"} == set(llmkit.__all__)
    assert homes == llmkit._HOMES
