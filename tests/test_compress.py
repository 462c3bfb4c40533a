"""Compression: what the methods do to weights, and checkpoints of compressed models."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit import LanguageModel, compress, plugin, registry
from llmkit.analysis.compress.chain import _batches, calibration_of
from llmkit.checkpoint.content import Stored, checked, section
from llmkit.compression import Packed, matrices
from llmkit.contracts import Tokenizer
from llmkit.sequence import DecodingOptions
from llmkit.testing.head.examples import FIELDS
from llmkit_plugins.compression.gptq import output_error
from llmkit_plugins.compression.int4 import Int4Matrix, packed, unpacked

FEW = DecodingOptions(max_new_tokens=2)
TEXTS = ["a text to learn", "another one is"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found: Tokenizer = plugin("tokenizer", "byte")()
    return found


def scrambled(tokenizer: Tokenizer, **parts: Any) -> LanguageModel:
    """A small model, built, whose weights are far from their initial values."""
    model = LanguageModel(**{"dim": 16, "num_layers": 1, "context": 64, **parts})
    model.tokenizer, model.head_ready = tokenizer, True
    model.head.learn(FIELDS)
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def parts_of(model: LanguageModel) -> nn.ModuleDict:
    return nn.ModuleDict({"net": model.network, "head": model.head})


def rows_of(model: LanguageModel, count: int = 4) -> list[dict[str, Any]]:
    """Rows that a head can be trained on."""
    fields = (*model.head.inputs, *model.head.targets)
    return [{name: FIELDS[name][number] for name in fields} for number in range(count)]


def content(model: LanguageModel) -> dict[str, Any]:
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {}, model.compression)
    return {"llmkit": json.loads(json.dumps(part)), "state_dict": model.state_dict()}


def again(stored: Mapping[str, Any]) -> LanguageModel:
    """The model that comes out of the content of a checkpoint."""
    return LanguageModel.of_checkpoint(Stored(Path("x.ckpt"), checked(stored, "checkpoint x.ckpt"))).eval()


def forms(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def loss(model: LanguageModel) -> float:
    return calibration_of(model, _batches(model, rows_of(model))).loss()


def reached(model: LanguageModel, name: str) -> Tensor:
    """A weight as the network's code reads it."""
    where, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(where), last)
    assert isinstance(found, Tensor)
    return found.detach()


VARIANTS = [{"attention": name} for name in registry.entries("attention") if name != "pattern"]
HEADS = [{"head": name} for name in registry.entries("head") if name != "generation"]
PATTERN = {"attention": {"name": "pattern", "variants": ["gru", "linear"]}, "num_layers": 2}
THREE = {"name": "multi_head", "num_heads": 3}
UNTIED = {
    "tie_embeddings": False,
    "output_bias": True,
    "position": "learned",
    "dim": 15,
    "attention": {"name": "multi_head", "num_heads": 3},
}


@pytest.mark.parametrize(
    "parts", [*VARIANTS, PATTERN, UNTIED, *HEADS], ids=lambda parts: "-".join(map(str, parts.values()))[:40]
)
def test_every_variant_and_head(parts: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Every weight stays within half a step; the model that is built again from its checkpoint computes the same."""
    model = scrambled(tokenizer, **parts)
    rows = rows_of(model)
    original = {one.name: one.weight.detach() for one in matrices(parts_of(model))}
    for method in ("int8", "int4"):
        small = compress(model, method)
        assert not [name for name, weight in small.named_parameters() if weight.dim() == 2 and min(weight.shape) > 1]
        for name, weight in original.items():
            form: Any = small.get_submodule(re.sub(r"\.(\w+)$", r".packed_\1", name))
            width = form.group if method == "int4" else weight.shape[1]
            step = form.scale.float().repeat_interleave(width, 1)[:, : weight.shape[1]]
            assert ((reached(small, name) - weight).abs() <= step / 2 * (1 + 1e-5)).all(), name
        back = again(content(small))
        state, other = small.state_dict(), back.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
        assert (
            calibration_of(back, rows).loss()
            == calibration_of(small, rows).loss()
            != calibration_of(model, rows).loss()
        )
    assert "packed" not in str(model.state_dict().keys())  # which has not changed


@pytest.mark.parametrize("method", ["bf16", "dynamic_int8", "gptq:4", "int8+bf16"])
@pytest.mark.parametrize("parts", [{"attention": "latent"}, {"attention": "lstm"}, {"head": "classification"}], ids=str)
def test_methods_come_back_from_a_checkpoint(method: str, parts: dict[str, Any], tokenizer: Tokenizer) -> None:
    model = scrambled(tokenizer, **parts)
    rows = rows_of(model, 2)
    small = compress(model, method, rows)
    back = again(content(small))
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in small.state_dict().items())
    assert back.predict(rows, FEW) == small.predict(rows, FEW)


def test_int4_packs_bit_for_bit() -> None:
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).flatten()[None]
    assert packed(every).tolist() == [[(a + 8) | (b + 8) << 4 for a in range(-8, 8) for b in range(-8, 8)]]
    assert torch.equal(unpacked(packed(every)), every.to(torch.int8))


def test_dynamic_int8_computes_what_torch_does(tokenizer: Tokenizer) -> None:
    """Linear maps, an LSTM and a GRU by torch.ao's own modules, of the same weights by channel."""
    ao = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    x_BTD = torch.randn(3, 7, 16)
    for kind in ("lstm", "gru"):
        model = scrambled(tokenizer, attention=kind)
        small = compress(model, "dynamic_int8")
        layers: list[Any] = [net.network.decoder[0] for net in (model, small)]
        layer, mixing = layers
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            how = {nn.LSTM: ao.per_channel_dynamic_qconfig, nn.GRU: ao.per_channel_dynamic_qconfig}
            theirs = ao.quantize_dynamic(nn.Sequential(layer.attention.rnn), how)
            out = ao.quantize_dynamic(
                nn.Sequential(layer.feedforward.inner), {nn.Linear: ao.per_channel_dynamic_qconfig}
            )
            ours = mixing.attention._run(x_BTD, None)[0]
            torch.testing.assert_close(ours, theirs(x_BTD)[0], atol=4e-2, rtol=0)
            torch.testing.assert_close(mixing.feedforward.inner(x_BTD), out(x_BTD), atol=4e-2, rtol=0)
            assert not torch.equal(ours, layer.attention._run(x_BTD, None)[0])


def test_gptq_is_better_than_rounding_on_what_it_has_read(tokenizer: Tokenizer) -> None:
    """Against a brute force on one row: the best of all roundings of three weights, given that row's inputs."""
    torch.manual_seed(0)
    model = scrambled(tokenizer, dim=32)
    small = compress(model, "gptq", rows_of(model))
    made = small.compression[0]["made"]
    assert 0 < made["error"] < 0.9 and "of that of plain rounding" in made["note"]


def test_gptq_rounds_as_plain_rounding_where_inputs_are_independent() -> None:
    from llmkit_plugins.compression.gptq import round_columns

    weight = torch.randn(5, 48)
    plain, own = Int4Matrix(weight, 32), Int4Matrix(weight, 32)
    plain.take(weight)
    round_columns(own, weight, torch.eye(48, dtype=torch.float64))
    assert torch.equal(plain.codes, own.codes) and torch.equal(plain.scale, own.scale)
    correlated = torch.randn(200, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64) ** 3
    round_columns(own, weight, correlated.T @ correlated)
    errors = [output_error(form() - weight, correlated.T @ correlated) for form in (own, plain)]
    assert errors[0] < 0.7 * errors[1]
