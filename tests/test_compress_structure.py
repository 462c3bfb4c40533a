"""Low rank, pruning and the removal of heads, channels and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, done
from torch import Tensor, nn

import llmkit as package
from llmkit import LanguageModel, UserError, compress, plugin, registry
from llmkit.analysis.compress.chain import parse
from llmkit.checkpoint.content import Stored, checked, section
from llmkit.compression import Calibration
from llmkit.ops.decoding import Decoder
from llmkit.run.saving import save_model
from llmkit.sequence import Sequence
from llmkit_plugins.compression.svd import Product, decomposed

TEXTS = ["the first text", "and a second one", "third, and the last"]
IDS = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))


def network(attention: str = "multi_head", head: str = "generation", layers: int = 2, **more: Any) -> LanguageModel:
    torch.manual_seed(0)
    parts = {"head": plugin("head", head), "dim": 16, "num_layers": layers, "context": 16}
    given = {"attention": plugin("attention", attention)} | more
    model = LanguageModel(**parts, **given)  # type: ignore[arg-type]
    model.tokenizer = plugin("tokenizer", "byte")()
    model.head_ready = True
    model.configure_model()
    for parameter in model.parameters():  # as after training: each map counts
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def states(model: LanguageModel) -> Tensor:
    return model.network.decode(IDS, Sequence.of(IDS))


def content(model: LanguageModel) -> dict[str, Any]:
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {}, model.compression)
    return {"llmkit": json.loads(json.dumps(part)), "state_dict": model.state_dict()}


def again(stored: dict[str, Any]) -> LanguageModel:
    """The model that comes out of the content of a checkpoint."""
    return LanguageModel.of_checkpoint(Stored(Path("x.ckpt"), checked(stored, "checkpoint x.ckpt"))).eval()


@torch.no_grad()
def decoded(model: LanguageModel) -> Tensor:
    """The states of decoding token by token."""
    decoder = Decoder(model.network, 2, 12)
    return torch.stack([decoder.feed(column) for column in IDS.split(1, 1)])


def weight(model: LanguageModel, name: str) -> Tensor:
    module, _, last = name.rpartition(".")
    found: Tensor = getattr(nn.ModuleDict({"net": model.network, "head": model.head}).get_submodule(module), last)
    return found.detach()


@pytest.mark.parametrize("method", ["whitened_svd50", "wanda2:4"])
@pytest.mark.parametrize("attention", registry.entries("attention"))
def test_every_variant(attention: str, method: str) -> None:
    """Is compressed, gives the states of a model with the new matrices, decodes, and comes back from a file."""
    model = network(attention)
    small = compress(model, method, TEXTS)
    made = small.compression[0]["made"]
    names = made["ranks"] if "svd" in method else made["kept"]
    dense = network(attention)
    with torch.no_grad():
        for name in names:
            weight(dense, name).copy_(weight(small, name))
            assert not torch.equal(weight(dense, name), weight(model, name))
    torch.testing.assert_close(states(small), states(dense), rtol=0, atol=1e-5)
    loaded = again(content(small))
    assert torch.equal(states(loaded), states(small))
    torch.testing.assert_close(decoded(loaded), decoded(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chain", ["prune50+int8", "svd50+int4", "drop_heads50+wanda50+int8"])
def test_chains(chain: str) -> None:
    """The parts of a pruned or factored map are quantized, and zeros stay zero."""
    model = network()
    first, small = (compress(model, text, TEXTS) for text in (chain.rpartition("+")[0], chain))
    for name in next(iter(first.compression[-1]["made"].values())):
        before, after = weight(first, name), weight(small, name)
        assert (before - after).abs().max() < 0.2 * before.abs().max() and not torch.equal(before, after)
        assert torch.equal(before == 0, after == 0) or "svd" in chain
    assert not [name for name, value in small.named_parameters() if value.dim() == 2]
    assert torch.equal(states(again(content(small))), states(small))


# Low rank


def low_rank(model: nn.ModuleDict, text: str, rows: Calibration | None = None) -> dict[str, Any]:
    with torch.no_grad():
        return parse(text)[0].method().apply(model, rows)


class Map(nn.Module):
    """One linear map, and inputs that lie nearly in a plane."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.map = nn.Linear(12, 10)
        nn.init.normal_(self.map.weight, generator=generator)
        directions = torch.randn(3, 12, generator=generator)
        self.x = torch.randn(200, 3, generator=generator) @ directions + 0.05 * torch.randn(
            200, 12, generator=generator
        )
        self.original = self.map.weight.detach().clone()

    def distance(self) -> float:
        """How far the outputs are from the original ones, relative to their size."""
        with torch.no_grad():
            read = self.map(self.x) - self.map.bias
            return float((read - self.x @ self.original.T).norm() / (self.x @ self.original.T).norm())

    @property
    def rows(self) -> Calibration:
        return Calibration(self.distance, 200)


@torch.no_grad()
def test_the_full_rank_is_the_map() -> None:
    part, x = nn.Linear(64, 5), torch.randn(7, 64)
    for moments in (None, (x.T @ x).double()):  # of fewer rows than columns: no direction is lost
        product = Product(part.weight, 5)
        product.take(*decomposed(part.weight, moments))
        assert (product() - part.weight).abs().max() < 1e-6
        assert (product.linear(x, part.bias) - part(x)).abs().max() < 1e-6


def test_plain_is_the_best_of_its_rank_and_whitened_beats_it_on_the_inputs() -> None:
    results: dict[str, tuple[float, float]] = {}
    for name in ("svd60", "whitened_svd60"):
        part = Map()
        made = low_rank(nn.ModuleDict({"net": part}), name, part.rows if "white" in name else None)
        assert made == {"ranks": {"net.map.weight": 3}}  # 0.6 * 120 / 22
        kept = part.map.weight.detach()
        results[name] = float((kept - part.original).norm()), part.distance()
    plain, whitened = results.values()
    values = torch.linalg.svdvals(Map().original.double())
    assert plain[0] == pytest.approx(float(values[3:].norm()), rel=1e-5) and plain[0] < whitened[0]
    assert whitened[1] < 0.1 * plain[1]


@pytest.mark.parametrize(("text", "rank"), [("svd@0.6", 3), ("whitened_svd@0.05", 3)])
def test_ranks_from_an_error_budget(text: str, rank: int) -> None:
    """The lowest rank that stays within it; what is measured is what was promised."""
    part, error = Map(), float(text.partition("@")[2])
    white = "white" in text
    assert low_rank(nn.ModuleDict({"net": part}), text, part.rows if white else None)["ranks"]["net.map.weight"] == rank
    off = part.distance() if white else float((part.map.weight - part.original).detach().norm() / part.original.norm())
    values = decomposed(part.original, part.x.T.double() @ part.x.double() if white else None)[1]
    assert off == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-3)
    assert off <= error < values[rank - 1 :].norm() / values.norm()


# Pruning


@pytest.mark.parametrize("text", ["prune50", "prune25", "wanda50", "prune2:4", "wanda1:4"])
def test_the_share_is_exact_and_the_right_weights_stay(text: str) -> None:
    part = Map()
    made = low_rank(nn.ModuleDict({"net": part}), text, part.rows if "wanda" in text else None)
    pruned, norm = part.map.weight.detach(), part.x.norm(dim=0) if "wanda" in text else torch.ones(12)
    share = {"50": 0.5, "25": 0.25, "2:4": 0.5, "1:4": 0.75}[text.removeprefix("prune").removeprefix("wanda")]
    assert made["zeros"] == share and int((pruned == 0).sum()) == share * 120
    assert torch.equal(pruned[pruned != 0], part.original[pruned != 0])
    for row, (now, before) in enumerate(zip(pruned, part.original * norm, strict=True)):
        groups = [slice(i, i + 4) for i in range(0, 12, 4)] if ":" in text else [slice(0, 12)]
        for group in groups:  # a slow plain choice
            size = group.stop - group.start
            smallest = sorted(range(size), key=lambda i, g=group, b=before: float(b[g][i].abs()))  # type: ignore[misc]
            assert {int(i) for i in (now[group] == 0).nonzero()} == set(smallest[: round(share * size)]), row


def test_the_file_is_smaller_and_zeros_stay_in_further_training(tmp_path: Path) -> None:
    """A recovery run is a fit from the compressed checkpoint, with what was removed still gone."""
    (tmp_path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    given = ["fit", "--data.train", tmp_path / "text.txt", *TINY, "--model.dim", 64, "--model.num_layers", 2]
    first = done(*given, "--output", tmp_path / "first").checkpoint
    save_model(package.load(first), tmp_path / "whole.ckpt")
    texts = (tmp_path / "text.txt").read_text().splitlines()[:20]
    for text, share in {"prune75": 0.5, "drop_layers1+drop_heads50+drop_channels50+svd40": 0.3}.items():
        small = compress(first, text, texts)
        save_model(small, tmp_path / "small.ckpt")
        assert (tmp_path / "small.ckpt").stat().st_size < share * (tmp_path / "whole.ckpt").stat().st_size
        words = [word for word in given if word not in ("--data.tokenizer", "char")]
        run = done(*words, "--model.init_from", tmp_path / "small.ckpt", "--output", tmp_path / text)
        after = package.load(run.checkpoint)
        assert after.compression == small.compression
        names = next(iter(small.compression[-1]["made"].values()))
        assert names
        for name in names:
            now, then = weight(after, name), weight(small, name)
            assert not torch.equal(now, then)
            if text == "prune75":
                assert torch.equal(now == 0, then == 0) and float((now == 0).float().mean()) == 0.75


# Structure


@torch.no_grad()
def masked(model: LanguageModel, made: dict[str, Any], small: LanguageModel) -> None:
    """Mask in a whole model what a small one has lost: the columns of ``out`` that are not left."""
    for name in next(iter(made.values())):
        whole, part = weight(model, f"{name}.out.weight"), weight(small, f"{name}.out.weight")
        left = [any(torch.equal(column, kept) for kept in part.T) for column in whole.T]
        assert sum(left) == part.shape[1] < whole.shape[1]
        whole.mul_(torch.tensor(left))


@pytest.mark.parametrize("attention", ["multi_head", "grouped_query", "sliding_window"])
@pytest.mark.parametrize("method", ["drop_heads50", "drop_channels25"])
def test_removing_equals_masking(attention: str, method: str) -> None:
    """Keys and values of decoding are those of the heads that are left."""
    model = network(attention, feedforward=plugin("feedforward", "swiglu", bias=True))
    small = compress(model, method, TEXTS)
    made = small.compression[0]["made"]
    left = 36 if "channels" in method else 1 if attention == "grouped_query" else 2
    assert set(next(iter(made.values())).values()) == {left}
    masked(model, made, small)
    torch.testing.assert_close(states(small), states(model), rtol=0, atol=1e-5)
    loaded = again(content(small))
    assert torch.equal(states(loaded), states(small))
    torch.testing.assert_close(decoded(loaded), decoded(model), rtol=0, atol=1e-4)
    if "heads" in method:
        states_ = [each.network.init_state(2, 12) for each in (loaded, model)]
        assert states_[0] is not None and states_[1] is not None
        assert 2 * states_[0][0]["k"].shape[1] == states_[1][0]["k"].shape[1]


def test_the_layer_without_effect_goes() -> None:
    """A layer that adds nothing is found, for a variant of any kind; removing it changes nothing."""
    for attention in ("multi_head", "gru"):
        model = network(attention, layers=3)
        idle: Any = model.network.decoder[1]
        with torch.no_grad():
            for part in (idle.attention, idle.feedforward):
                part.register_forward_hook(lambda module, args, y: 0 * y)
        small = compress(model, "drop_layers1", TEXTS)
        assert small.compression[0]["made"] == {"layers": {"decoder": [0, 2]}, "note": "without decoder 1"}
        torch.testing.assert_close(states(small), states(model), rtol=0, atol=1e-5)
        assert torch.equal(states(again(content(small))), states(small))


def test_the_head_and_the_channel_without_effect_go() -> None:
    model = network()
    with torch.no_grad():
        layers: Any = model.network.decoder
        for layer in layers:
            layer.attention.out.weight[:, 4:8] *= 1e-3
            layer.feedforward.inner.weight[5] *= 1e-3
    for method in ("drop_heads25", "drop_channels2"):
        small = compress(model, method, TEXTS)
        assert (states(small) - states(model)).abs().max() < 1e-2


def test_an_encoder_decoder() -> None:
    """Cross-attention loses heads too, and each side keeps a layer."""
    model = network(head="translation")
    rows = [{"source": text, "target": text[::-1]} for text in TEXTS]
    small = compress(model, "drop_heads50+drop_layers1+prune50", rows)
    assert len(small.compression[0]["made"]["heads"]) == 6
    assert sorted(map(len, small.compression[1]["made"]["layers"].values())) == [1, 2]
    loaded = again(content(small))
    assert loaded.score(rows) == small.score(rows) and loaded.predict(rows) == small.predict(rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("svd", "takes the percentage of parameters to keep above 0 and below 100, as in 50, got ''"),
        ("svd0", "takes the percentage of parameters to keep above 0 and below 100, as in 50, got '0'"),
        ("svd100", "takes the percentage of parameters to keep above 0 and below 100, as in 50, got '100'"),
        ("svd@x", "takes the largest error after @, as in @0.1, got 'x'"),
        ("svd@2", "error must be above 0 and below 1, got 2.0"),
        ("svd@0.001", "makes no linear map smaller"),
        ("prune2:2", "keep must be at least 1 and less than of, got 2 of 2"),
        ("wandax", "takes the percentage of weights to remove above 0 and below 100, as in 50, got 'x'"),
        ("drop_layersx", "takes the number of layers to remove, as in 1, got 'x'"),
        ("drop_layers2", "can remove at most 1 layers of this model, got 2"),
        ("drop_heads0", "takes the percentage of heads to remove"),
        ("svd50+svd50", "there is no linear map left to compress"),
        ("svd50+drop_channels50", "there is no feedforward network with two plain linear maps"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=f"compression '.*': .*{says}"):
        compress(network(), text, TEXTS)


def test_heads_with_a_bias_of_their_own_stay() -> None:
    model = network(position=plugin("position", "alibi"))
    with pytest.raises(UserError, match="the position encoding has a bias for each of them"):
        compress(model, "drop_heads50", TEXTS)
    with pytest.raises(UserError, match="there is no softmax attention with several heads"):
        compress(network("linear"), "drop_heads50", TEXTS)
