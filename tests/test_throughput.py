"""How fast a run says it is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, done
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llmkit
from llmkit.run.progress import Progress
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


def counted(model: llmkit.LanguageModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the FLOPs that torch counts for a training step, attention as two products over all pairs."""
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.head.loss(model.network, batch)
        loss.total.backward()
    # It does not know products that are added in place: the gradient of the output matrix.
    return float(counter.get_total_flops() + 2 * model.network.output_weight_VD.numel() * loss.count)


def built(head: str, **arguments: Any) -> llmkit.LanguageModel:
    model = llmkit.LanguageModel(llmkit.plugin("head", head, **arguments), dim=32, num_layers=2, context=64)
    model.tokenizer = llmkit.plugin("tokenizer", "byte")()
    model.configure_model()
    return model


@pytest.mark.parametrize(("source", "target"), [(8, 8), (40, 6), (6, 40)])
def test_flops_of_a_translation_are_those_that_torch_counts(source: int, target: int) -> None:
    """Each side counts by its own length; keys and values of cross-attention belong to the source."""
    model = built("translation")
    ids = torch.randint(5, 200, (3, 64))
    batch = {"source": ids[:, :source], "ids": ids[:, :target], "targets": ids[:, :target]}
    meter = Meter(model)
    meter.add(batch)
    hidden_pairs = 3 * 3 * 2 * (4 * target * target * 32 / 2)  # of causal attention: not needed, not counted
    assert meter.totals().flops == pytest.approx(counted(model, batch) - hidden_pairs, rel=0.01)


def test_flops_of_two_passes_are_those_that_torch_counts() -> None:
    model = llmkit.LanguageModel(llmkit.plugin("head", "classification", r_drop=1.0), dim=32, num_layers=2, context=64)
    model.tokenizer = llmkit.plugin("tokenizer", "byte")()
    model.head.set_info({"labels": ["a", "b"]})
    model.configure_model()
    batch = {"ids": torch.randint(6, 200, (4, 64)), "label": torch.tensor([0, 1, 0, 1])}
    meter = Meter(model)
    meter.add(batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train().head.loss(model.network, batch).total.backward()
    assert meter.totals().flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_masked_language_model_are_those_that_torch_counts() -> None:
    """The output matrix multiplies the chosen positions; here the vocabulary outweighs the layers."""
    model = built("masked_lm", mask_rate=0.4)
    batch = {"ids": torch.randint(6, 200, (16, 64))}
    meter = Meter(model)
    meter.add(batch)
    torch.manual_seed(0)
    assert meter.totals().flops == pytest.approx(counted(model, batch), rel=0.02)  # the choice is random


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


def test_a_notebook_has_one_line_that_is_rewritten(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stdout, in order with the report; only notes are on stderr, which is red there."""
    monkeypatch.setattr("llmkit.run.progress.in_notebook", lambda: True)
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0.0,))
    steps = ("--trainer.max_steps", 4, "--trainer.enable_progress_bar", "true", "--trainer.val_check_interval", 4)
    run = done("fit", "--data.train", text, *TINY, *steps, "--output", tmp_path)
    shown, after, *_ = run.out.partition("step 1/4")[2].split("\n")
    assert [part[:6] for part in f"step 1/4{shown}".split("\r")] == ["step 1", "step 2", "step 3", "step 4"]
    assert after.startswith("step 4: val_loss ") and "\nValidation:\n" in run.out
    assert all(line.startswith("llmkit: note:") for line in run.err.splitlines())


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
