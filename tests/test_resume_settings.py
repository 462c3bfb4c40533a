"""Optimizer and schedule of a resumed run: what the config changes is applied, or refused by name."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, Result, done, llmkit

STEPS = 4


def settings(result: Result) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the groups and the schedule's state of a run's last checkpoint."""
    file = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return file["optimizer_states"][0]["param_groups"], file["lr_schedulers"][0]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return ["fit", "--data.train", folder / "text.txt", *TINY, "--output", folder / "runs", "--name"]


@pytest.fixture(scope="module")
def begin(words: list[Any]) -> Callable[[str], Path]:
    """Return a function from options to the checkpoint of a run with them, after half of the steps."""

    @functools.cache
    def run(options: str) -> Path:
        result = done(*words, "begun", *options.split(), "--trainer.max_steps", STEPS)
        return result.folder / "checkpoints" / "last.ckpt"

    return run


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ("", "--model.optimizer.weight_decay 0 --model.optimizer.betas [0.5,0.6] --model.optimizer.lr 0.01"),
        ("--model.scheduler CosineAnnealingLR --model.scheduler.T_max 4", "--model.scheduler.T_max 8"),
        ("--model.scheduler OneCycleLR --model.scheduler.max_lr 0.01", ""),  # its length is the run's
        ("", "--model.scheduler StepLR --model.scheduler.step_size 3"),
    ],
)
def test_a_resumed_run_has_the_settings_of_one_that_always_had_them(
    words: list[Any], begin: Callable[[str], Path], options: str, changes: str
) -> None:
    every = [*words, "case", "--trainer.max_steps", 2 * STEPS, *options.split(), *changes.split()]
    (groups, schedule), expected = settings(done(*every, "--ckpt_path", begin(options))), settings(done(*every))
    assert json.dumps([groups, schedule]) == json.dumps(expected)


def test_another_optimizer_is_refused(words: list[Any], begin: Callable[[str], Path]) -> None:
    result = llmkit(
        *words, "sgd", *["--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--ckpt_path"], begin("")
    )
    assert result.code == 2
    assert "model.optimizer: is SGD, but the checkpoint has the state of AdamW" in result.err
