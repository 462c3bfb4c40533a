"""How fast a run says it is."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from command import TINY, done
from torch.utils.flop_counter import FlopCounterMode

import llmkit
from llmkit.run.throughput import LOGGED, Meter, memory, peak_flops


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    return path


def test_flops_of_a_step_are_those_that_torch_counts(text: Path, tmp_path: Path) -> None:
    sizes = ("--model.dim", "64", "--model.num_layers", "2", "--model.context", "32")
    run = done("fit", "--data.train", text, *TINY, *sizes, "--output", tmp_path)
    model = llmkit.load(run.checkpoint).train()
    ids = torch.randint(model.network.output_weight_VD.shape[0], (3, 32))
    batch = {"ids": ids, "targets": ids}
    meter = Meter(model)
    meter.add(batch)
    assert meter.totals().tokens == 96
    with FlopCounterMode(display=False) as counter:
        model.head.loss(model.network, batch).total.backward()
    # torch does not count its CPU kernel of attention: two products over half of the pairs of positions, three times.
    mixing = 3 * (4 * 32 * 64 / 2) * 2 * ids.numel()
    assert meter.totals().flops == pytest.approx(counter.get_total_flops() + mixing, rel=0.005)


def test_both_sides_of_a_translation_count() -> None:
    model = llmkit.LanguageModel(
        head=llmkit.plugin("head", "translation"),
        dim=32, num_layers=2, context=16,
    )  # fmt: skip
    model.tokenizer = llmkit.plugin("tokenizer", "byte")()
    meter = Meter(model)
    cost = model.meta_network().flops_per_position(8)
    meter.add({"source": torch.zeros(3, 8, dtype=torch.long), "targets": torch.zeros(3, 8, dtype=torch.long)})
    assert meter.totals().flops == pytest.approx(3 * 24 * cost)


def test_rates_are_logged_with_the_loss(text: Path, tmp_path: Path) -> None:
    more = ("--trainer.max_steps", "6", "--trainer.log_every_n_steps", "2")
    run = done(
        "fit", "--data.train", text, *TINY, *more, "--trainer.accumulate_grad_batches", "2", "--output", tmp_path
    )
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train_loss"]]
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert all(float(row[name]) > 0 for row in rows for name in LOGGED)
    assert all(float(row["mfu"]) < 1.2 for row in rows)


def test_the_progress_line_tells_them(text: Path, tmp_path: Path) -> None:
    run = done("fit", "--data.train", text, *TINY, "--trainer.enable_progress_bar", "true", "--output", tmp_path)
    line = next(line for line in run.err.splitlines() if line.startswith("step 2/2  loss"))
    assert " tokens/s  MFU " in line
    assert " GiB" in line


def test_pauses_do_not_count() -> None:
    model = llmkit.LanguageModel(head=llmkit.plugin("head", "generation"), dim=16, num_layers=1, context=8)
    model.tokenizer = llmkit.plugin("tokenizer", "byte")()
    meter = Meter(model)
    before = meter.totals().seconds
    meter.pause(5.0)
    assert meter.totals().seconds < before + 1 - 5


def test_the_peak_and_the_memory_are_of_this_machine() -> None:
    state = torch.get_rng_state()
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.05 < memory(torch.device("cpu")) < 1024
