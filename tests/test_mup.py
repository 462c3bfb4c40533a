"""muP: the tables of arXiv:2203.03466, nothing at the base width, and the coordinate check."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, done, llmkit
from torch import Tensor

import llmkit as package
from llmkit import LanguageModel, UserError, plugin
from llmkit.checkpoint.content import section
from llmkit.commands.verify.mup import table
from llmkit.hf.export import export
from llmkit.model.use import batch_of
from llmkit.sequence import Sequence
from llmkit.testing.coordinates import Part, slope

ROWS = [{"text": "a text of some length"}, {"text": "another"}]


def model(dim: int, base: int | None, head: Any = "generation", **settings: Any) -> LanguageModel:
    """Return a built model of two layers, always from the same seed."""
    torch.manual_seed(0)
    head = plugin("head", head) if isinstance(head, str) else head
    built = LanguageModel(head=head, dim=dim, num_layers=2, context=32, mup_base_dim=base, **settings)
    built.tokenizer = plugin("tokenizer", "byte")()
    if built.head.info().get("labels") is not None:
        built.head.set_info({**built.head.info(), "labels": ["a", "b", "c"]})
    built.configure_model()
    return built


def rates(built: LanguageModel) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of each parameter."""
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = built.parts.optimizer(built.groups()).param_groups
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def losses(built: LanguageModel, steps: int = 3) -> list[float]:
    """Return the losses of a few steps on one batch."""
    assert built.tokenizer is not None
    batch = batch_of(built.head, built.tokenizer, 32, ROWS, (*built.head.inputs, *built.head.targets))
    optimizer, found = built.parts.optimizer(built.groups()), []
    for _ in range(steps):
        loss = built.head.loss(built.network, batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        found.append(loss.total.item())
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_base_width_nothing_changes(optimizer: str) -> None:
    """Initial weights, optimizer groups and the losses of training are the standard ones, to the bit."""
    standard, own = (model(32, base, optimizer=plugin("optimizer", optimizer)) for base in (None, 32))
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in standard.state_dict().items())
    assert [set(group) for group in own.groups()] == [set(group) for group in standard.groups()]
    assert losses(own) == losses(standard)


def test_the_table_for_adamw() -> None:
    """Table 8 for the network, at four times the base width; the same table from the other side below it."""
    for dim in (128, 8):
        ratio = dim / 32
        standard, own = model(dim, None), model(dim, 32)
        before, after = standard.state_dict(), own.state_dict()
        assert own.network.output_multiplier == 1 / ratio
        hidden = torch.randn(3, dim)
        expected = hidden @ own.network.embedding.weight.T / ratio
        torch.testing.assert_close(hidden @ own.network.output_weight_VD.T, expected)
        for name, (lr, decay) in rates(own).items():
            matrix = ".attention." in name or ".feedforward." in name
            matrix = matrix and name.endswith("weight")
            torch.testing.assert_close(after[name] * (math.sqrt(ratio) if matrix else 1), before[name], msg=name)
            assert lr == pytest.approx(1e-3 / (ratio if matrix else 1)), name
            plain = 0.0 if own.kinds[name] == "vector" else 0.1
            assert decay == pytest.approx(plain * (ratio if matrix else 1)), name


def test_heads_and_other_parts() -> None:
    """A pooler is hidden, a classifier an output (table 3); an output matrix of its own has the multiplier."""
    head = plugin("head", "classification", pool="pooler")
    standard, own = model(64, None, head), model(64, 16, head)
    for name, scale, rate in (("head.pooler", 2, 4), ("head.classifier", 4, 4)):
        before, after = (built.state_dict()[f"{name}.weight"] for built in (standard, own))
        torch.testing.assert_close(after * scale, before, msg=name)
        assert rates(own)[f"{name}.weight"][0] == pytest.approx(1e-3 / rate)
        assert rates(own)[f"{name}.bias"][0] == 1e-3
    untied = model(64, 16, tie_embeddings=False, attention=plugin("attention", "low_rank", rank=4))
    found = {name: 1e-3 / lr for name, (lr, _) in rates(untied).items()}
    assert found["net.output.weight"] == found["net.embedding.weight"] == 1
    assert found["net.decoder.0.attention.read.weight"] == pytest.approx(4)
    assert (untied.network.output_weight_VD / untied.state_dict()["net.output.weight"]).unique().item() == 0.25
    assert model(64, 16, attention=plugin("attention", "lstm")).lr_scales["net.decoder.1.attention.rnn.weight_hh_l0"]


@pytest.mark.parametrize(
    ("attention", "scale"),
    [
        (plugin("attention", "multi_head"), 2 / 16),  # 1 / sqrt(4) at heads of 4 channels, 1 / E from there
        (plugin("attention", "multi_head", qk_norm=False, scale=1.0), 4 / 16),
        (plugin("attention", "multi_head", head_dim=8), None),
        (plugin("attention", "differential"), math.sqrt(2) / 8),
        (plugin("attention", "latent"), 4 / 16 / math.sqrt(6)),
    ],
    ids=["multi_head", "its own scale", "fixed heads", "differential", "latent"],
)
def test_the_scale_of_scores(attention: Any, scale: float | None) -> None:
    layer: Any = model(64, 16, attention=attention).network.decoder[0]
    found = layer.attention.scale
    assert found == scale if scale is None else found == pytest.approx(scale)


def test_muon_keeps_its_own_rule() -> None:
    """From the width to the width Muon's rate is the same at every width; AdamW's share follows the table."""
    attention = plugin("attention", "low_rank", rank=4)
    head = plugin("head", "classification")
    own = model(64, 16, head, attention=attention, optimizer=plugin("optimizer", "muon"))
    found = {name: lr for name, (lr, _) in rates(own).items()}
    assert found["net.encoder.0.feedforward.inner.weight"] == 0.02
    assert found["net.encoder.0.attention.read.weight"] == pytest.approx(0.02 / 2)
    assert found["net.embedding.weight"] == 3e-3 and found["head.classifier.weight"] == pytest.approx(3e-3 / 4)


def test_what_is_refused(tmp_path: Path) -> None:
    for settings, says in (
        ({"base": 0}, "model.mup_base_dim: must be at least 1, got 0"),
        ({"base": 10}, "model.mup_base_dim: no such model: dim 10 is not divisible by num_heads 4"),
        ({"base": 16, "optimizer": plugin("optimizer", "sgd")}, "for adamw and muon, not for SGD"),
    ):
        with pytest.raises(UserError, match=says):
            model(32, **settings)
    for words, says in (
        (("--widths", "64"), "verify mup: argument --widths: must be two or more widths with commas between them"),
        (("--widths", "8,x"), "must be two or more widths with commas between them, got '8,x'"),
        (("--widths", "16,18", *data(tmp_path)), "width 18: "),
        (("--picture", tmp_path / "text.txt" / "x.png", *data(tmp_path)), "text.txt"),
        (("--steps", "0"), "argument --steps: must be at least 1, got 0"),
    ):
        result = llmkit("verify", "mup", *words)
        assert result.code == 2 and says in result.err and result.err.count("error:") == 1, result.err


def data(folder: Path) -> tuple[object, ...]:
    """Write a text, and return the options of a tiny fit on it."""
    (folder / "text.txt").write_text("".join(f"line {i} of a small text\n" for i in range(60)))
    return ("--data.train", folder / "text.txt", *TINY, "--output", folder)


def test_a_run_is_resumed_and_loaded(tmp_path: Path) -> None:
    """Groups of their own and the multiplier survive: resuming is exact, and a loaded model scores the same."""
    words = ("fit", *data(tmp_path), "--model.mup_base_dim", 8, "--model.scheduler.total_steps", 4)
    whole, half = done(*words, "--trainer.max_steps", 4), done(*words, "--trainer.max_steps", 2)
    last = ("--ckpt_path", half.folder / "checkpoints" / "last.ckpt")
    resumed = done(*words, "--trainer.max_steps", 4, *last)
    ends: list[dict[str, Tensor]] = [
        torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (whole, resumed)
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    loaded: Any = package.load(whole.checkpoint).network
    assert loaded.output_multiplier == 0.5 and loaded.decoder[0].attention.scale is not None
    for other in ("null", "4"):
        result = llmkit(*words, "--trainer.max_steps", 4, *last, "--model.mup_base_dim", other)
        assert result.code == 2 and "model.mup_base_dim: is " in result.err, result.err


def test_an_exported_model_keeps_it(tmp_path: Path) -> None:
    """A folder of llmkit's own brings the multiplier back, and takes no other base width."""
    built = model(16, 8)
    part = section(built.spec, built.tokenizer, built.head, {})  # type: ignore[arg-type]
    export(tmp_path / "out", part, built.state_dict(), built.tokenizer, "")  # type: ignore[arg-type]
    name = f"hf:{tmp_path / 'out'}"
    ids = torch.tensor([[1, 2, 3]])
    scores = [
        one.network.decode(ids, Sequence.of(ids)) @ one.network.output_weight_VD.T
        for one in (built.eval(), LanguageModel.published(name).eval())
    ]
    assert torch.equal(*scores)
    with pytest.raises(UserError, match="model.mup_base_dim: is 4, but the model of init_from has 8"):
        LanguageModel(built.head.__class__, dim=16, num_layers=2, context=32, init_from=name, mup_base_dim=4)


def test_the_coordinate_check(tmp_path: Path) -> None:
    """Flat with muP and not flat without, at a full rate of 0.01 too; a table, a picture, and an exit code."""
    words = ["verify", "mup", *data(tmp_path), "--widths", "32,96,384", "--seeds", 2, "--model.optimizer.lr", 0.01]
    own = llmkit(*words, "--model.mup_base_dim", 128)
    assert own.code == 0 and "NOT FLAT" not in own.out and "muP of base width 128, 4 steps" in own.out, own.out
    assert "decoder.0.attention" in own.out and "scores" in own.out
    assert re.search(r"without muP [0-3] of 5 parts are flat", own.out), own.out
    for line in own.out.splitlines():
        if line.startswith("decoder."):
            slope_with, slope_without = (float(word) for word in re.findall(r"([+-]\d\.\d\d) ±", line))
            assert slope_with < 0.1 < 0.5 < slope_without, line
    assert Path(own.out.splitlines()[-1].removeprefix("picture: ")).read_bytes().startswith(b"\x89PNG")
    standard = llmkit(*words, "--seeds", 1, "--widths", "16,128", "--model.mup_base_dim", "null")
    assert standard.code == 1 and "NOT FLAT" in standard.out and "without muP" not in standard.out, standard.out


def test_slopes_and_verdicts() -> None:
    assert slope([2, 4, 8], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert math.isnan(slope([2, 4], [0.0, 1.0])) and not Part("x", [0.0, 1.0], math.nan).passed
    parts = [Part("x", [1.0, 1.0], 0.05, 0.03), Part("y", [1.0, math.inf], math.nan)]
    text = table([2, 4], parts)
    assert "1 of 2 parts are flat" in text and "NOT FLAT" in text and "another verdict on x: use more --seeds" in text
    assert "+0.05 ± 0.03" in text and not parts[1].doubtful and "without" not in text
    text = table([2, 4], parts[:1], parts[:1])
    assert "without muP 1 of 1 parts are flat\nso this check does not show that muP is needed" in text
