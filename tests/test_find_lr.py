"""The learning rate range test: what it suggests, what it leaves as it was, and what it cannot do."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, llmkit

from llmkit.commands.fit import run_instead
from llmkit.run import find_lr as module
from llmkit.run.cli import CLI
from llmkit.testing import invariance


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    return ["--data.train", str(tmp_path / "text.txt"), *TINY, "--output", str(tmp_path)]


def test_the_steepest_descent_is_against_the_logarithm() -> None:
    """A logistic curve in the logarithm of the rate falls fastest in its middle; against the rate it would be early."""
    rates = [10 ** (-6 + 6 * n / 99) for n in range(100)]
    losses = [3 - 1 / (1 + math.exp(-3 * (math.log10(rate) + 2))) for rate in rates]
    assert rates[module.steepest(rates, losses) or 0] == pytest.approx(1e-2, rel=0.1)
    assert module.steepest(rates, losses[::-1]) is None  # it rises everywhere
    assert module.steepest(rates, [*losses[:11], *[math.nan] * 89]) is None


def test_a_rate_is_suggested(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the range, with a picture in the run folder and no checkpoint; from a stream and several batches too."""
    monkeypatch.setattr(module, "STEPS", 40)
    stream = [
        "--data.streaming",
        "true",
        "--data.validation",
        str(tmp_path / "text.txt"),
        "--trainer.accumulate_grad_batches=2",
    ]
    for more in ([], stream):
        result = llmkit("fit", *words, *more, "--find_lr")
        assert result.code == 0 and result.out.startswith("suggested: --model.optimizer.lr "), result
        assert 1e-6 < float(result.out.split()[2]) < 1
        picture = Path(result.out.splitlines()[-1].removeprefix("picture: "))
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.parent.parent == tmp_path / "run"
        assert not [*tmp_path.rglob("*.ckpt")]


def test_nothing_is_changed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are those of a model that was never trained, and random numbers continue where they were."""
    monkeypatch.setattr(module, "STEPS", 15)
    monkeypatch.setattr(module, "steepest", lambda rates, losses: 11)
    found: list[Any] = []

    def states(cli: CLI) -> int:
        before = torch.get_rng_state(), random.getstate()
        module.find_lr(cli)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        found.append(cli.model.state_dict())
        return 0

    def untouched(cli: CLI) -> int:
        invariance.build(cli.model, cli.datamodule)
        found.append(cli.model.state_dict())
        return 0

    for work in (states, untouched):
        run_instead(work, words, "fit")
    assert found[0].keys() == found[1].keys() and len(found[0])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.optimizer", "muon"], "model.optimizer: muon has two learning rates"),
        (["--model.mup_base_dim", "8"], "model.mup_base_dim: gives weights different learning rates"),
        (["--model.layer_decay", "0.9"], "model.layer_decay: gives weights different learning rates"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run: --find_lr needs 100 steps"),
    ],
)
def test_what_it_cannot_do(more: list[str], says: str, words: list[str]) -> None:
    result = llmkit("fit", *words, *more, "--find_lr")
    assert result.code == 2 and says in result.err and result.err.count("error:") == 1, result.err
