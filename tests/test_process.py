"""Several runs in one process: each leaves it as it was found, and begins as in a new one."""

from __future__ import annotations

import gc
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from command import TINY, done, llmkit
from torch._dynamo.callback import callback_handler

import llmkit as kit
from llmkit.testing.invariance import build


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return ["fit", "--data.train", str(tmp_path / "text.txt"), *TINY, "--output", str(tmp_path / "runs")]


def state() -> dict[str, Any]:
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "variables": [os.environ.get(name) for name in names],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "filters": list(warnings.filters),
    }


def test_a_run_leaves_the_process_as_it_was(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """On a machine with Slurm too, whose ``srun`` is not mentioned: this is no job."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.touch(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}{os.pathsep}{os.environ['PATH']}")
    words += ["--trainer.deterministic", "true", "--trainer.benchmark", "true", "--seed_everything", "3"]
    before = state()
    done(*words)
    assert state() == before
    assert not any("srun" in str(warning.message) for warning in recwarn)
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    assert llmkit(*words, "--trainer.overfit_batches", "0.001").code == 2
    assert state() == before
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


def test_each_model_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch keeps a number of graphs of a class, here one; the models after that ran eagerly, in silence."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    compile, calls = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(graph)
            return graph(*given)

        return run

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend))
    (tmp_path / "text.txt").write_text("once upon a time there was a note\n" * 20)
    limit: dict[str, Any] = {name: 1}
    with torch._dynamo.config.patch(**limit):
        for dim in (8, 16, 24):
            data = kit.DataModule(
                train=str(tmp_path / "text.txt"), tokenizer=kit.plugin("tokenizer", "byte"), batch_size=2
            )
            model = kit.LanguageModel(dim=dim, num_layers=1, context=16, compile=True)
            build(model, data)
            before = len(calls)
            model.train()
            model.head.loss(model.network, next(iter(data.train_dataloader())))
            assert len(calls) > before, dim
    torch.compiler.reset()


def test_a_recompilation_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths: the first step compiles, a later one compiles again, which is named with its reason."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager"))
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{'a' * n},{i % 2}\n" for i, n in enumerate((3, 3, 9, 9, 5, 5)))
    )
    rows = tmp_path / "rows.csv"
    words = ("fit", "--data.train", rows, "--data.validation", rows, *TINY, "--output", tmp_path / "runs")
    more = ("--model.head", "classification", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1")
    err = done(*words, *more, "--model.compile", "true").err
    torch.compiler.reset()
    notes = [line for line in err.splitlines() if "compile" in line]
    first = "llmkit: note: the first step compiles the network, which takes a minute or more (model.compile)"
    assert notes[0] == first and notes[1].startswith("llmkit: note: the network is compiled, which took ")
    assert len(notes) > 2 and all(
        re.match(r"llmkit: note: step [234] compiled .* again, .* s \(.+\)", n) for n in notes[2:]
    )
    assert not callback_handler.start_callbacks and not callback_handler.end_callbacks
    assert "compile" not in done(*words, *more).err
    for value, code, text in (
        (
            "reduce-overhead",
            2,
            "model.compile: reduce-overhead makes CUDA graphs, and this run is on cpu: use true or ",
        ),
        ("fast", 2, "model.compile: expected true or false or reduce-overhead, got 'fast'"),
    ):
        refused = llmkit(*words, *more, "--model.compile", value)
        assert refused.code == code and text in refused.err


def test_files_of_one_name(words: list[str], tmp_path: Path) -> None:
    """Runs import each their own, and what lies next to it; one run cannot have both."""
    plugin = (
        "import of_one_name_helper\nfrom llmkit import register\nfrom llmkit_plugins.norm import RMSNorm\n\n\n"
        "@register('norm', 'NAME')\nclass Mine(RMSNorm):\n    factor = of_one_name_helper.FACTOR\n"
    )
    for factor, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of_one_name.py").write_text(plugin.replace("NAME", name))
        (tmp_path / name / "of_one_name_helper.py").write_text(f"FACTOR = {factor}\n")
    files = [str(tmp_path / name / "of_one_name.py") for name in ("one", "two")]
    for factor, (name, file) in enumerate(zip(("one", "two"), files, strict=True)):
        checkpoint = done(*words, "--imports", file, "--model.norm", name).checkpoint
        (norm,) = {type(module) for module in kit.load(checkpoint).modules() if type(module).__name__ == "Mine"}
        assert norm.factor == factor  # type: ignore[attr-defined]
    result = llmkit(*words, "--imports", files[1], "--model.norm", "one")
    assert "unknown norm 'one'" in result.err
    (tmp_path / "two" / "other.py").write_text("import of_one_name_helper\n")
    done(*words, "--imports", files[0], str(tmp_path / "two" / "other.py"), "--model.norm", "one")
    result = llmkit(*words, "--imports", *files)
    assert result.code == 2
    assert "another module is already called 'of_one_name'" in result.err
