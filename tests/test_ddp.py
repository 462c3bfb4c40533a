"""Two processes, started as a user does: the same model and the same numbers as one process, and one run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, done

TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy")
SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
EXACT = (
    *(
        "--trainer.precision",
        "32-true",
        "--model.dropout",
        "0",
        "--model.optimizer",
        "{name: SGD, lr: 0.2, momentum: 0.9}",
    ),
    *("--model.scheduler", "{name: ConstantLR, factor: 1.0}", "--trainer.max_steps", "4"),
    *("--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1.0"),
)


def start(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, which starts further ones."""
    command = [sys.executable, "-m", "llmkit", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def processes(*words: object) -> str:
    """Start a command that has to succeed; returns what its processes printed."""
    result = start(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(output: Path) -> dict[str, Any]:
    """Return the results of the only run below a folder."""
    (path,) = output.rglob("results.json")
    assert [folder.name for folder in path.parent.parent.iterdir()] == ["version_0"]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Assert that results are equal but for rounding."""
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value), key


def without(options: Sequence[str], *keys: str) -> list[str]:
    """Return options without some keys and their values."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for key, value in pairs if key not in keys for word in (key, value)]


@pytest.mark.parametrize(
    "strategy", ["ddp", json.dumps({"class_path": SHARDED, "init_args": SIZES})], ids=["ddp", "sharded"]
)
def test_two_processes_train_as_one_with_the_double_batch(strategy: str, tmp_path: Path) -> None:
    """Weights and metrics of a language model: each step sees the same blocks."""
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    words = ("--data.train", tmp_path / "text.txt", *without(TINY, "--data.batch_size", "--trainer.max_steps"), *EXACT)
    one = done("fit", *words, "--data.batch_size", "4", "--output", tmp_path / "one")
    printed = processes("fit", *words, *TWO, strategy, "--data.batch_size", "2", "--output", tmp_path / "two")
    assert printed.count("Run folder:") == 1  # one process reports
    same(results(tmp_path / "one"), results(tmp_path / "two"))
    for name in ("best", "last"):
        weights = [
            torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for folder in (one.folder, tmp_path / "two" / "run" / "version_0")
        ]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_two_processes_measure_as_one(tmp_path: Path) -> None:
    """Every row counts once, though their number is odd and their lengths differ."""
    rows = "".join(f"{'word ' * (i % 5)}{i},{'abc'[i % 3]}\n" for i in range(23))
    (tmp_path / "labels.csv").write_text(f"text,label\n{rows}")
    data = ("--data.train", tmp_path / "labels.csv", "--data.test", tmp_path / "labels.csv")
    fitted = done("fit", *data, *TINY, "--model.head", "classification", "--output", tmp_path / "fit")
    words = ("test", "--ckpt_path", fitted.checkpoint, "--trainer.precision", "32-true", "--data.batch_size", "4")
    done(*words, "--trainer.accelerator", "cpu", "--output", tmp_path / "one")
    processes(*words, *TWO, "ddp", "--output", tmp_path / "two")
    same(results(tmp_path / "one"), results(tmp_path / "two"))


def test_tensor_parallel_is_refused(tmp_path: Path) -> None:
    """Lightning's default splits layers, which no layer here supports: the processes would train apart, unnoticed."""
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    words = ("--data.train", tmp_path / "text.txt", *TINY, *TWO, json.dumps({"class_path": SHARDED}))
    result = start("fit", *words, "--output", tmp_path / "runs")
    assert result.returncode == 2
    assert "data_parallel_size" in result.stderr
    assert "Traceback" not in result.stderr
