"""What a command imports before it begins, and what it prints in the meantime."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from command import llmkit

from llmkit import lazy, main
from llmkit.commands import start

UNUSED = (
    *("transformers", "scipy", "pandas", "sklearn", "IPython", "torch.utils.tensorboard"),
    *("torchmetrics.text", "torchmetrics.functional.audio", "torchmetrics.classification", "datasets"),
)
IMPORTS = f"""
import sys
from llmkit import lazy
lazy.defer({{}})
import llmkit.commands.fit
found = [name for name in {UNUSED} if name in sys.modules]
assert found == [], found
import torchmetrics, matplotlib.pyplot as plt
from torchmetrics import Metric, MetricCollection
assert (type(torchmetrics), type(plt)) == (lazy.Deferred, lazy.Deferred)
from torchmetrics.classification import MulticlassAccuracy
assert issubclass(MulticlassAccuracy, Metric) and torchmetrics.Metric is Metric is torchmetrics.metric.Metric
assert type(torchmetrics) is type(torchmetrics.functional) is lazy.Deferred
assert plt.style.context and isinstance(plt.subplots()[0], plt.Figure) and type(plt) is type(sys)
"""


def test_lightning_brings_nothing_that_is_not_used() -> None:
    """And what is deferred is there when it is asked for."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], check=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A deferred package that fails the first time that its code runs."""
    folder = tmp_path / "startup_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .part import ran\nran.append(1)\nname = 1 / (len(ran) - 1)\n")
    (folder / "part.py").write_text("ran = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    part = "startup_package.part"
    monkeypatch.setitem(lazy.PACKAGES, "startup_package", {"home": lambda: importlib.import_module(part).ran})
    context = nullcontext()
    monkeypatch.setattr(sys, "meta_path", [lazy._Finder({"startup_watched": context}), *sys.meta_path])
    (tmp_path / "startup_watched.py").write_text("import startup_package\n")
    yield importlib.import_module("startup_watched").startup_package
    for name in ("startup_package", part, "startup_watched"):
        sys.modules.pop(name, None)


def test_a_deferred_package_runs_when_a_name_is_asked_for(package: ModuleType) -> None:
    ran = importlib.import_module("startup_package.part").ran
    assert package.home is ran
    assert package.part.ran is ran
    assert not hasattr(package, "__wrapped__")  # what inspect asks every module
    assert ran == []
    for _ in range(2):
        if not ran:
            with pytest.raises(ZeroDivisionError):
                _ = package.name
    assert package.name == 1.0
    assert ran == [1, 1]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
    assert importlib.reload(package).name == 0.5  # it is a module like any other


def test_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before torch is imported, and so does a mistake in a file; it is not printed where nothing is loaded."""
    monkeypatch.chdir(tmp_path)
    config = {"model": {"head": {"name": "classification"}, "dim": 8, "num_layers": 2}, "trainer": {"max_steps": 3}}
    Path("a.yaml").write_text(yaml.safe_dump(config))
    assert "llmkit: fit" not in llmkit("fit", "--config", "a.yaml").err
    monkeypatch.setattr(start, "HEAVY", "not loaded")
    result = llmkit("fit", "--config", "a.yaml", "--model.attention", "{name: lstm}", "--trainer.max_steps", "5")
    assert result.err.splitlines()[0] == "llmkit: fit a.yaml: classification, lstm, dim 8, 2 layers, 5 steps"
    assert result.err.splitlines()[1].startswith("llmkit: error: ")  # it has no data
    assert llmkit("test", "--ckpt_path", "x").err.splitlines()[0] == "llmkit: test: checkpoint x"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "llmkit: fit" not in llmkit("fit", "--config", "a.yaml").err
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name) if name.endswith(".fit") else start)
    assert llmkit("fit", "--config", "b.yaml").err == (
        "llmkit: error: --config b.yaml does not exist. Did you mean 'a.yaml'?\n"
    )


def test_a_terminal_shows_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    loading = main._Loading("PyTorch")
    with loading:
        assert terminal.getvalue() == ""  # not in the first second
        loading.timer.function()
        assert terminal.getvalue() == "llmkit: loading PyTorch ..."
    assert terminal.getvalue().endswith(" \r")
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with loading:
        assert not loading.timer.is_alive()
