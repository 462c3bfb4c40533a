"""Every precision plugin of Lightning: what adds up or ranks keeps its own dtype."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import TINY, done, llmkit
from lightning.pytorch.plugins.precision import DoublePrecision, FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from test_decoding import Markov
from torchmetrics import MeanMetric, Metric

from llmkit import DataModule, LanguageModel, plugin, registry
from llmkit.model.step import gradient_norm
from llmkit.ops.decoding import generate
from llmkit.ops.metrics import Metrics
from llmkit.sequence import DecodingOptions, Memory, Sequence
from llmkit.testing.attention.subject import Subject
from llmkit_plugins.position import Alibi, slopes

PLUGINS: dict[str, Any] = {
    "32-true": Precision,
    "64-true": DoublePrecision,
    "16-true": lambda: HalfPrecision("16-true"),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "fsdp bf16-true": lambda: FSDPPrecision("bf16-true"),
}


def test_each_precision_of_lightning_runs_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 20)
    words = ("fit", "--data.train", tmp_path / "text.txt", *TINY, "--output", tmp_path / "runs", "--trainer.precision")
    for precision in ("16-true", "bf16-true", "64-true", "16-mixed", "bf16-mixed"):
        folder = done(*words, precision).folder
        on_cpu = "bf16-mixed" if precision == "16-mixed" else precision  # Lightning's choice
        assert json.loads((folder / "results.json").read_text())["precision"] == on_cpu
    if not torch.cuda.is_available():
        for precision in ("transformer-engine", "transformer-engine-float16"):
            result = llmkit(*words, precision)
            assert result.code == 2 and result.err.count("\n") == 1
            start = f"llmkit: error: command line: trainer.precision: {precision} multiplies in fp8"
            assert result.err.startswith(start) and "pip install 'transformer_engine[pytorch]'" in result.err


def metrics_of_all_heads() -> dict[str, Any]:
    found: dict[str, Any] = {"of torchmetrics": MeanMetric()}
    for name in registry.entries("head"):
        head = plugin("head", name)()
        if hasattr(head, "labels"):
            head.labels = ["O", "B-X"]
        found |= {f"{name} {metric}": value for metric, value in head.metrics("test").items()}
    return found


@pytest.mark.parametrize("precision", PLUGINS)
def test_no_plugin_narrows_the_states_of_a_metric(precision: str) -> None:
    lightning = PLUGINS[precision]()
    with lightning.module_init_context():
        metrics: Any = lightning.convert_module(Metrics(metrics_of_all_heads))
    for name, metric in metrics.items():
        assert isinstance(metric, Metric)
        expected = type(metric) is MeanMetric and precision != "64-true"
        with lightning.forward_context():
            if isinstance(metric, MeanMetric):
                metric.update(torch.ones(1000, dtype=torch.float32))
                metric.update(torch.tensor(1002.0, dtype=torch.float32))  # bfloat16 has no 1001 and no 2002
                assert float(metric.compute()) == 2
            metric.reset()
        for state in metric._defaults:
            value = getattr(metric, state)
            if isinstance(value, list):  # of predictions, which are kept in the dtype they come in
                continue
            dtype = value.dtype
            least = torch.float32 if expected else torch.float64
            assert not dtype.is_floating_point or torch.promote_types(dtype, least) == dtype, (name, state, dtype)


class Whole(pl.Callback):
    """Keeps the dtype of the weights, to see that the plugin was in force."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.dtype = next(pl_module.parameters()).dtype


def test_validation_is_the_same_at_any_batch_size_in_any_precision(tmp_path: Path) -> None:
    """The loss of 200 batches of one row: a running sum in half precision would be off by several percent."""
    rng = torch.Generator().manual_seed(0)
    text = tmp_path / "text.txt"
    text.write_text("".join("abcdefgh \n"[i] for i in torch.randint(10, (1601,), generator=rng).tolist()))
    found: dict[tuple[str, int], dict[str, float]] = {}
    for precision, size in itertools.product(["32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"], [1, 200]):
        if size == 1 and not precision.endswith("16-true"):
            continue
        char, cache = plugin("tokenizer", "char"), str(tmp_path / "cache")
        data = DataModule(
            train=str(text),
            validation=str(text),
            tokenizer=char,
            batch_size=size,
            cache_dir=cache,
        )
        torch.manual_seed(0)
        model = LanguageModel(plugin("head", "generation"), dim=8, num_layers=1, context=8)
        seen = Whole()
        quiet: Any = {"precision": precision, "accelerator": "cpu", "logger": False, "callbacks": [seen]}
        quiet |= dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
        trainer = pl.Trainer(**quiet)
        trainer.validate(model, data, verbose=False)
        found[precision, size] = {name: float(value) for name, value in model.results.items()}
        assert seen.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
            precision, torch.float32
        )
    right = found["32-true", 200]
    for way, values in found.items():
        assert values == pytest.approx(right, rel=0.01), way


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_beam_search_does_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    options = DecodingOptions(max_new_tokens=12, num_beams=4)
    for seed in range(20):
        scores = 2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        expected = generate(Markov(scores), [[1], [2]], options, eos_id=0)
        try:
            torch.set_default_dtype(default)
            net = Markov(scores)
            assert generate(net, [[1], [2]], options, eos_id=0) == expected
        finally:
            torch.set_default_dtype(torch.float32)


def test_alibi_is_exact_whatever_the_default_dtype() -> None:
    positions = torch.arange(2000)[None]
    try:
        torch.set_default_dtype(torch.bfloat16)
        bias = Alibi(8, 2000).bias(positions[:, -1:], positions, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    distance = torch.arange(1999, -1, -1, dtype=torch.float64)
    expected = -slopes(6).double()[:, None] * distance
    assert bias is not None
    torch.testing.assert_close(bias[0, :, 0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_a_half_precision_gradient_is_in_single_precision(dtype: torch.dtype) -> None:
    gradients = [torch.full((300, 300), 250.0, dtype=dtype), torch.full((7,), 3.0, dtype=dtype)]
    expected = (300 * 300 * 250.0**2 + 7 * 9) ** 0.5  # 75,000: above the range of float16
    assert float(gradient_norm(gradients)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["lstm", "gru", "min_gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_recurrence_that_forgets_slowly_keeps_what_it_adds_up(name: str, dtype: torch.dtype) -> None:
    """What a nearly closed gate adds in a step is less than half precision resolves; against double precision."""
    length = 768
    subject = Subject(plugin("attention", name), 16)
    x = subject.x(1, length) + 0.5

    def slow(weights: torch.dtype) -> Any:
        module: Any = subject.build("causal")
        if name == "min_gru":
            module.gate.bias.data.fill_(-7)
        else:
            # The gates are i, f, g, o of the LSTM, and r, z, n of the GRU; its z keeps what is there.
            bias = module.rnn.bias_hh_l0.data.view(-1, 16)
            bias[1] = 12
            if name == "lstm":
                bias[0] = -7
            module.rnn.weight_hh_l0.data.mul_(0.1)
        return module.to(weights)

    with torch.no_grad():
        expected = slow(torch.float64)(x, Sequence.dense(length))
        half = slow(dtype)
        state = half.init_state(1, length, half.get_parameter(next(iter(half.state_dict()))))
        found = [half(x.to(dtype), Sequence.dense(length)), half(x.to(dtype), Sequence.dense(length), state=state)]
        with torch.autocast("cpu", dtype):
            found.append(slow(torch.float32)(x.float(), Sequence.dense(length)))
    for actual in found:
        error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error[:, -64:].mean()) < 0.01


@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["linear", "retention", "low_rank"])
def test_sums_over_a_long_text_do_not_overflow_in_float16(name: str, weights: torch.dtype) -> None:
    """The sums of linear attention pass 65,504 here; cross-attention sums over its memory in one product."""
    length, subject = 1024, Subject(plugin("attention", name), 32)
    x = 8 * subject.x(1, length)
    for role in subject.roles:
        memory = None if role != "cross" else Memory(x, Sequence.dense(length))
        with torch.no_grad():
            expected = subject.build(role)(x, Sequence.dense(length), memory=memory)
            module, given = subject.build(role, weights), x.to(weights)
            memory = None if role != "cross" else Memory(given, Sequence.dense(length))
            with torch.autocast("cpu", torch.float16, enabled=weights == torch.float32):
                actual = module(given, Sequence.dense(length), memory=memory)
        error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.median()) < 0.01 and bool(actual.isfinite().all()), role
