"""Lightning's private corners: one module knows them, and it is right about the oldest and the newest version."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import lightning
import pytest
from lightning.pytorch.callbacks import Callback
from lightning_corners import check_all

from llmkit.data import DataModule
from llmkit.lightning import BuildFirst
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import CLI, SavedConfig
from llmkit.run.compilation import Compilation
from llmkit.run.folder import RunFolder, RunLogger
from llmkit.run.memory import ReturnMemory
from llmkit.run.progress import Progress
from llmkit.run.provenance import Provenance
from llmkit.run.report import Predictions
from llmkit.run.saving import Checkpoints, WholeFileIO
from llmkit.run.shutdown import GracefulShutdown
from llmkit.run.throughput import Throughput
from llmkit.run.validation import Validations
from llmkit.testing.resume import Trace

ROOT = Path(__file__).resolve().parent.parent
LIGHTNING = Path(lightning.__file__).parent
OLDEST = Path(sys.prefix) / "oldest-lightning"

INTERNALS = {"fit_loop", "epoch_loop", "batch_progress", "val_check_batch", "cluster_environment"}
"""Attributes without an underscore that belong to Lightning's loops and connectors."""
IN_TEXTS = re.compile("PL_GLOBAL_SEED|epoch_loop|fit_loop|_connector")
"""How a private corner looks in a string: a key of a checkpoint's loops, a file name, an environment variable."""


def private_names(folder: Path) -> set[str]:
    """Return the attributes with an underscore that the classes of a package define or set."""
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return set(re.findall(r"\b(?:def|self\.)\s*(_[a-z]\w*)", source))


def touched(path: Path, private: set[str]) -> Iterator[str]:
    """Yield Lightning's private names in a file: attributes of anything but ``self`` and ``super()``, and strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                if node.attr in INTERNALS:
                    yield node.attr
            case ast.Attribute(attr=name) if name in INTERNALS or name in private:
                yield name
            case ast.Constant(value=str(text)) if id(node) not in docs and IN_TEXTS.search(text):
                yield text


def test_one_module_knows_the_private_corners() -> None:
    private = private_names(LIGHTNING / "pytorch" / "loops") | private_names(LIGHTNING / "pytorch" / "trainer")
    files = sorted((ROOT / "llmkit").rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix(): set(touched(path, private)) for path in files}
    own = found.pop("llmkit/lightning.py")
    assert {"_should_accumulate", "_accelerator_connector", "batch_progress", "checkpoint_connector.py"} <= own
    assert {f"{name}: {text}" for name, texts in found.items() for text in texts} == set()


CLASSES = (
    *(CLI, SavedConfig, LanguageModel, DataModule, WholeFileIO),
    *(BuildFirst, Checkpoints, GracefulShutdown, Predictions, Progress, ReturnMemory, RunFolder, RunLogger, Throughput),
    *(Trace, Validations, Compilation, Provenance),
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_private_name_of_a_base_class_is_taken(cls: type) -> None:
    """Not even by accident: an attribute ``_results`` of ours would overwrite Lightning's."""
    used = re.compile(r"(?:\bself\.|\bsuper\(\)\.|\bdef )(_[a-z]\w*)")
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("lightning")]
    theirs = {name for base in bases for name in used.findall(inspect.getsource(base))}
    assert bases
    assert not set(used.findall(inspect.getsource(cls))) & theirs


def test_all_classes_are_looked_at() -> None:
    """Every callback of the package is in ``CLASSES``."""
    names = {
        node.name
        for path in (ROOT / "llmkit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and {ast.unparse(base).split(".")[-1] for base in node.bases}
        & {"Callback", "Checkpoint", "ProgressBar", "SaveConfigCallback"}
    }
    assert names == {cls.__name__ for cls in CLASSES if issubclass(cls, Callback)}


def test_the_corners_are_what_they_are_taken_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Lightning installed."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which a check sets
    check_all(tmp_path)


ANOTHER = """
import runpy, sys, typing

for name in [*sys.modules]:
    if name.partition(".")[0] in ("lightning", "llmkit", "llmkit_plugins", "command"):
        del sys.modules[name]
# Without its cache, in which an Optional[float | int] of Fabric's stands for the Trainer's Optional[int | float].
typing._SpecialForm.__getitem__ = typing._SpecialForm.__getitem__.__wrapped__
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with the Lightning that is first on the path, and without the seconds that importing torch takes."""


def test_the_corners_of_the_oldest_lightning(tmp_path: Path) -> None:
    """The oldest that pyproject.toml allows, in a process of its own."""
    match = re.search(r'"lightning>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert match
    expected, path = match[1], [str(OLDEST), str(Path(__file__).parent), str(ROOT), str(ROOT / "plugins")]
    if not (OLDEST / f"lightning-{expected}.dist-info").is_dir():
        pytest.fail(f"needs lightning {expected} in {OLDEST}: `make test` installs it")
    (tmp_path / "another.py").write_text(ANOTHER)
    command = [sys.executable, str(tmp_path / "another.py"), str(Path(__file__).with_name("lightning_corners.py"))]
    answer = forked.run([*command, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(path)})
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == expected
