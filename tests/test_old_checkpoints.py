"""Checkpoints that llmkit wrote before its modules moved: they answer, and a resumed run is the run of that time."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import done

from llmkit import load
from llmkit.checkpoint.content import read
from llmkit.data.examples import Examples
from llmkit.data.tokens import split_batches

OLD = Path(__file__).resolve().parent / "old_checkpoints"
"""Written at step 6 of 10 by commit 5782d4d, in fp32, from the data below."""
LOSSES = {
    "generation": [3.08838152885437, 3.088139533996582, 3.0825109481811523, 3.0790016651153564],
    "translation": [3.5453431606292725, 3.5497312545776367, 3.5444610118865967, 3.5465030670166016],
}
"""Training losses of steps 7 to 10, as that commit went on from the same files."""
ANSWERS = {"generation": "h" * 12, "translation": "NNHHrdoNHrSS"}
"""Its greedy answers to ``the cat``."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("old")
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird"]
    (path / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(60)))
    rows = [" ".join(draw.choices(words, k=4)) for _ in range(40)]
    (path / "a.en").write_text("\n".join(rows) + "\n")
    (path / "a.de").write_text("\n".join(row.upper() for row in rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.mark.parametrize("head", LOSSES)
def test_an_old_checkpoint_answers(head: str) -> None:
    path = OLD / f"{head}.ckpt"
    assert "llmkit.optim" in repr(read_raw(path)) and "llmkit.optim" not in repr(read(path)["llmkit"])
    answer = json.loads(done("infer", path, "the cat", "--greedy", "--max_new_tokens", "12", "--json").out)
    assert answer["text"] == ANSWERS[head]
    assert load(path).spec["optimizer"]["class_path"].startswith("llmkit.model.optim.")


def read_raw(path: Path) -> object:
    """llmkit's section of a checkpoint as it is in the file."""
    return torch.load(path, weights_only=True)["llmkit"]


def order_of_that_time(examples: Any, rng: np.random.Generator) -> list[Any]:
    """Return the batches of an epoch as that commit ordered examples; since then rows move between batches."""
    noise = (1 + examples.lengths / 16) * rng.random(len(examples))
    batches = split_batches(np.lexsort((examples._skew + noise, examples._rounded)), examples.batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


@pytest.mark.parametrize("head", LOSSES)
def test_a_run_is_resumed_from_an_old_checkpoint(head: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Examples, "training_order", order_of_that_time)
    train = "text.txt" if head == "generation" else "{source: a.en, target: a.de}"
    words = ("--data.train", train, "--trainer.max_steps", "10", "--trainer.max_epochs", "-1", "--name", head)
    result = done("fit", "--ckpt_path", OLD / f"{head}.ckpt", *words, "--trainer.log_every_n_steps", "1")
    with open(result.folder / "metrics.csv", encoding="utf-8") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses == pytest.approx(LOSSES[head], rel=1e-6)
