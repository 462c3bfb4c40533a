"""Steps whose gradient is not finite: they change nothing, they are counted, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, Result, done, llmkit
from torch import Tensor, nn

from llmkit.model.optim import AdamW, Muon
from llmkit.model.step import BadSteps

OPTIMIZERS: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
    "fused": lambda weight: AdamW([weight], lr=0.1),
    "plain": lambda weight: torch.optim.SGD([weight], lr=0.1, momentum=0.9),
    "muon": lambda weight: Muon([{"params": [weight], "kind": "matrix"}], lr=0.1, weight_decay=0.1),
    "muon's adam": lambda weight: Muon([weight], adam_lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wait", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing(kind: str, wait: int, value: float) -> None:
    """The weights go on as if the step had not been; read at once, or some steps later as on an accelerator."""

    def train(gradients: list[float]) -> tuple[Tensor, BadSteps, list[int]]:
        weight = nn.Parameter(torch.ones(1, 3))
        optimizer, guard = OPTIMIZERS[kind](weight), BadSteps(10)
        found = []
        for step, gradient in enumerate(gradients, 1):
            weight.grad = torch.tensor([[gradient, 1.0, 2.0]])
            guard.add(step, {}, weight.grad.norm(), optimizer, wait)
            optimizer.step()
            found += [number for number, _ in guard.settle(wait)]
        found += [number for number, _ in guard.settle()]
        return weight.detach(), guard, found

    weight, guard, found = train([1.0, value, 2.0, 3.0, value])
    expected, _, none = train([1.0, 2.0, 3.0])
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    assert found == [2, 5]
    assert none == []
    assert guard.in_a_row == 1


def test_the_count_ends_with_a_good_step() -> None:
    guard, weight = BadSteps(3), nn.Parameter(torch.ones(1))
    told = []
    for step, norm in enumerate([1.0, float("nan"), float("nan"), 1.0, float("inf"), float("nan"), float("nan")], 1):
        guard.add(step, {"ids": torch.tensor(step)}, torch.tensor(norm), torch.optim.SGD([weight]), 1)
        told += [(number, guard.in_a_row) for number, _ in guard.settle()]
    assert told == [(2, 1), (3, 2), (5, 1), (6, 2), (7, 3)]


def test_steps_that_are_read_together_are_counted_one_by_one() -> None:
    """As on an accelerator: the third step is the third in a row, whichever were read with it."""
    guard, optimizer = BadSteps(3), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    for step, norm in enumerate([float("nan"), 1.0, float("inf"), float("nan")], 1):
        guard.add(step, {}, torch.tensor(norm), optimizer, 4)
        assert step == 4 or not list(guard.settle(4))
    assert [(number, guard.in_a_row) for number, _ in guard.settle(4)] == [(1, 1), (3, 1), (4, 2)]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    own = ("--imports", "faults", "--checkpoint.every_n_steps", "1", "--trainer.max_steps", "8")
    return ["fit", "--data.train", str(tmp_path / "text.txt"), *TINY, *own, "--output", str(tmp_path / "runs")]


def poison(steps: list[int]) -> tuple[str, str]:
    return "--trainer.callbacks", f'{{"class_path": "faults.Poison", "init_args": {{"steps": {steps}}}}}'


def last(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("last.ckpt")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_the_run_stops_after_too_many(words: list[str], tmp_path: Path) -> None:
    result: Result = llmkit(*words, *poison([2, 4, 5, 6, 7]), "--model.max_bad_steps", "3")
    assert result.code == 2
    assert [line for line in result.err.splitlines() if "note: step" in line] == [
        f"llmkit: note: step {step}: the loss or its gradient is NaN or infinite; the step is skipped"
        for step in (2, 4, 5)
    ]
    error = result.err.splitlines()[-1]
    assert "step 6: the loss or its gradient is NaN or infinite, 3 step(s) in a row" in error
    assert "number 6 of the run" in error
    (batch,) = (tmp_path / "runs").rglob("bad_step_6.pt")
    assert str(batch) in error
    assert torch.load(batch, weights_only=True)["ids"].shape == (2, 16)
    content = last(tmp_path / "runs")
    assert content["global_step"] == 5
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_bad_batch_with_texts_is_saved(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "a b c\tä ☃\n" * 8)
    files = [f"--data.{part}={tmp_path / 'pairs.tsv'}" for part in ("train", "validation")]
    own = ("--imports", "faults", "--model.head", "translation", *poison([1]), "--model.max_bad_steps", "1")
    assert llmkit("fit", *files, *TINY, *own, "--output", str(tmp_path / "runs")).code == 2
    (path,) = (tmp_path / "runs").rglob("bad_step_1.pt")
    batch = torch.load(path, weights_only=True)
    assert batch["reference"] == ["ä ☃"] * len(batch["ids"])


def test_single_bad_steps_do_not_stop_it(words: list[str]) -> None:
    result = done(*words, *poison([3, 6]))
    assert result.err.count("is skipped") == 2


def test_a_resumed_run_goes_on_counting(words: list[str], tmp_path: Path) -> None:
    """Two bad steps before the end of the first run and one after it are three in a row."""
    done(*words, *poison([7, 8]), "--model.max_bad_steps", "3")
    result = llmkit(
        *words, *poison([9]), "--model.max_bad_steps", "3", "--trainer.max_steps", "12", "--ckpt_path", "last"
    )
    assert result.code == 2
    assert "step 9: the loss or its gradient is NaN or infinite, 3 step(s) in a row" in result.err
