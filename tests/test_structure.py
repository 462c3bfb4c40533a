"""Imports run one way, and the light modules stay light."""

from __future__ import annotations

import ast
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


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    base = ROOT / "plugins" if path.is_relative_to(ROOT / "plugins") else ROOT
    package = list(path.parent.relative_to(base).parts)
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), package, top_level=top_level))


def reaches(names: set[str], *packages: str) -> list[str]:
    return sorted(name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages))


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_framework_knows_no_plugin(path: Path) -> None:
    assert not reaches(imported(path), "llmkit_plugins")
    texts = [
        node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
    ]
    assert not [text for text in texts if isinstance(text, str) and text.startswith("llmkit_plugins")]


@pytest.mark.parametrize("name", ["contracts", "sequence", "registry", "errors"])
def test_what_plugins_import_needs_no_lightning(name: str) -> None:
    names = imported(ROOT / "llmkit" / f"{name}.py")
    assert not reaches(names, "lightning", "pytorch_lightning", "jsonargparse")
    # They stand at the bottom: each other, and nothing above.
    assert all(
        used.split(".")[1] in ("contracts", "sequence", "registry", "errors") for used in reaches(names, "llmkit")
    )


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: module_name(path, ROOT / "plugins"))
def test_plugins_stay_below_the_trainer(path: Path) -> None:
    names = imported(path)
    assert not reaches(names, "lightning", "pytorch_lightning", "jsonargparse")
    above = ["backbone", "callbacks", "checkpoint", "cli", "commands", "config", "main", "module"]
    assert not reaches(names, *(f"llmkit.{name}" for name in above))


def test_modules_import_each_other_in_one_direction() -> None:
    modules = {module_name(path): path for path in CORE}
    graph = {name: imported(path, top_level=True) & set(modules) for name, path in modules.items()}
    for name, used in graph.items():
        # `from llmkit.data import cache` inside llmkit.data names the package, which is being imported anyway.
        graph[name] = {other for other in used if not f"{name}.".startswith(f"{other}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


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
    ],
)
def test_loaded_modules(code: str, absent: list[str]) -> None:
    code = f"import sys; {code}; print(*[name for name in {absent} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == ""


PRINTING = ("errors", "main", "run.progress", "run.report", "run.shutdown", "commands")
"""Notes, answers of commands, progress, reports and the notice of a shutdown: all that prints."""


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_nothing_but_reports_prints(path: Path) -> None:
    calls = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not calls or reaches({module_name(path)}, *(f"llmkit.{name}" for name in PRINTING))


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
