"""Attributions, rollout, lens, probes, scores of heads, faithfulness: against plain computations and planted facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit import LanguageModel, plugin
from llmkit.analysis.explain.attribution import integrated_gradients, jacobian, occlusion
from llmkit.analysis.explain.faithfulness import METHODS, areas, bootstrap, measure, randomised, ranks
from llmkit.analysis.explain.lens import guesses_by_layer, losses_by_layer
from llmkit.analysis.explain.patterns import PATTERNS, even_scores, pattern_scores, random_ids, score_heads
from llmkit.analysis.explain.probing import Items, items_of, probe
from llmkit.analysis.explain.rollout import rollout, shares
from llmkit.analysis.explain.scored import ScoredRow, watched
from llmkit.errors import UserError
from llmkit.registry import entries
from llmkit.sequence import DecodingOptions, Sequence
from llmkit.testing.head.examples import FIELDS
from llmkit_plugins.tokenizer import Byte, Word


def tiny(head: str, attention: str = "multi_head", scale: float = 2.0, layers: int = 2, **rest: Any) -> LanguageModel:
    """Return a network with random weights for a head that has learned the example rows."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"head": plugin("head", head, **rest), "attention": plugin("attention", attention)}
    model = LanguageModel(**parts, dim=16, num_layers=layers, context=64)
    model.tokenizer, model.head_ready = (Word() if head == "probe" else Byte()), True
    fields = (*model.head.inputs, *model.head.targets)
    if head == "probe":
        model.tokenizer.train(text for name in fields for text in FIELDS[name])
    model.head.learn({name: FIELDS[name] for name in fields})
    model.configure_model()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(scale)
    return model.eval().requires_grad_(False)


def row_of(model: LanguageModel, number: int = 2) -> dict[str, Any]:
    """Return an example row with its targets."""
    return {name: FIELDS[name][number] for name in (*model.head.inputs, *model.head.targets)}


@pytest.mark.parametrize("head", sorted(entries("head")))
def test_every_head_is_explained(head: str) -> None:
    """Integrated gradients add up at the embedding and at a layer, and the lens ends in the model's own loss."""
    model = tiny(head, scale=1.0, layers=1)
    given = row_of(model, 4 if head == "masked_lm" else 2)  # of short texts the loss chooses no token
    row = ScoredRow(model, given)
    whole = row.score(torch.stack([row.x_RTD, row.baseline_RTD]))
    jacobian_P = jacobian(row)
    assert jacobian_P.shape == (len(row.ids),) and jacobian_P.isfinite().all() and len(row.tokens) == len(row.ids)
    batch = model._batch([given], (*model.head.inputs, *model.head.targets))
    losses = losses_by_layer(model, batch)
    assert len(losses) == 2 and losses[-1] == pytest.approx(float(model.head.loss(model.network, batch).total), 1e-6)
    pytest.importorskip("captum")
    for layer in (None, row.layers[0]):
        found = integrated_gradients(row, layer)
        assert found.difference == pytest.approx(float(whole[0] - whole[1]), rel=1e-4, abs=1e-6)
        assert found.missed <= 1e-2 * abs(found.difference) + 1e-6


@pytest.fixture
def linear() -> tuple[LanguageModel, Tensor]:
    """A classifier whose scores are linear in the embeddings, and its weights, (C, D): one letter, z, decides."""
    model = tiny("classification")
    net = model.network
    net.encoder_norm = torch.nn.Identity()
    for layer in net.encoder:
        layer.forward = lambda x_BTD, *rest: x_BTD
    weight_CD: Tensor = model.head.classifier.weight  # type: ignore[union-attr,assignment]
    direction_D = weight_CD[1] - weight_CD[0]
    assert model.tokenizer is not None
    net.embedding.weight[model.tokenizer.encode("z")[0]] = 2000 * direction_D / direction_D.norm()
    return model, weight_CD


def test_attributions_of_a_linear_model_are_exact(linear: tuple[LanguageModel, Tensor]) -> None:
    pytest.importorskip("captum")
    model, weight_CD = linear
    row = ScoredRow(model, "abz cd")
    assert row.class_ is not None and len(row.free) == 6
    expected_P = (row.x_RTD[0] - row.baseline_RTD[0]) @ weight_CD[row.class_] / 6
    found = integrated_gradients(row, steps=2)
    assert found.steps == 2 and found.complete and found.missed <= 1e-4 * abs(found.difference)
    torch.testing.assert_close(found.values_P, expected_P, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(occlusion(row), expected_P, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(jacobian(row), (weight_CD[row.class_].norm() / 6).expand(6))
    assert int(found.values_P.argmax()) == 2


def test_a_planted_word_is_found_by_deletion_and_insertion(linear: tuple[LanguageModel, Tensor]) -> None:
    """The curves against sums over their points, and the figures of a method that knows and of one that does not."""
    model, _ = linear
    row = ScoredRow(model, "abcdzefghi")
    order = [4, *(place for place in range(10) if place != 4)]
    whole, without = row.probability(row.with_baseline([[], [4]])).tolist()
    assert whole > 0.99 > 0.7 > without
    rest = [float(row.probability(row.with_baseline([order[:k]]))) for k in range(11)]
    assert areas(row, [order])[0][0] == pytest.approx(sum(rest[1:10]) / 10 + (rest[0] + rest[10]) / 20, abs=1e-6)
    methods = {"knows": jacobian_of_x, "first": lambda row: -torch.arange(float(len(row.ids)))}
    texts = ["abcdzefghi", "zabcdefg", "the letter z", "amazing", "razzia in it", "x"]
    found = measure(model, texts, methods)
    assert found["knows"].texts == 5 and found["knows"].whole.value > 0.99
    assert found["knows"].deletion_gain.low > 0.05 and found["knows"].insertion_gain.low > 0.05
    assert found["first"].deletion_gain.value < found["knows"].deletion_gain.value
    gain = found["knows"].deletion_gain
    assert gain.low <= gain.value <= gain.high
    assert found["knows"].randomised is not None and found["knows"].randomised.value < 0.9
    assert found["first"].randomised is not None and found["first"].randomised.value == pytest.approx(1)


def jacobian_of_x(row: ScoredRow) -> Tensor:
    """Return the product of input and gradient, which is exact for a linear model."""
    x_NRTD = row.x_RTD[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(row.score(x_NRTD).sum(), x_NRTD)
    return (gradient * x_NRTD).sum(-1).flatten().detach()


@pytest.mark.parametrize("attention", sorted(entries("attention")))
def test_every_variant_is_measured(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods give finite figures; the maps of heads have scores."""
    monkeypatch.setattr("llmkit.analysis.explain.attribution.MOST_STEPS", 32)
    pytest.importorskip("captum")
    model = tiny("classification", attention, scale=1.0)
    row = ScoredRow(model, "abcdef")
    maps = row.maps()
    assert len(maps) == 2 and all(map_HPP.shape[1:] == (6, 6) for map_HPP in maps)
    scores = score_heads(model, random_ids(Byte(), 2, 5)).scores
    assert len({(one.layer, one.head) for one in scores}) == len(scores) >= 2
    assert all(0 <= getattr(one, name) <= 1 for one in scores for name in PATTERNS)
    found = measure(model, ["abcdef"], METHODS)
    for name, figures in found.items():
        assert math.isfinite(figures.deletion.value + figures.insertion.value), name
        assert figures.randomised is not None and -1 <= figures.randomised.value <= 1, name


def test_ranks_and_means() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 2.0, 2.0])) == [3.0, 0.0, 1.5, 1.5]
    draws = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    mean = bootstrap(draws)
    half = 1.97 * float(torch.tensor(draws).std()) / 200**0.5
    assert (mean.low, mean.high) == pytest.approx((mean.value - half, mean.value + half), abs=0.02)


def test_random_weights_leave_the_model_as_it_was() -> None:
    model = tiny("classification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = randomised(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in other.state_dict().items():
        assert value.shape == before[name].shape
        assert value.dim() < 2 or not torch.equal(value, before[name]), name


def test_rollout() -> None:
    """Of identity maps it is the identity; else the product of (A + I) / 2, written out position by position."""
    eye_HTT = torch.eye(5).expand(3, 5, 5)
    torch.testing.assert_close(rollout([eye_HTT] * 4), torch.eye(5))
    maps = [torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(n)).tril() for n in range(3)]
    flows = torch.eye(4)
    for map_HTT in maps:
        new = torch.zeros(4, 4)
        for t in range(4):
            sizes = [sum(float(head[t, s].abs()) for head in map_HTT) for s in range(4)]
            for s in range(4):
                new[t] += (sizes[s] / sum(sizes) + (s == t)) / 2 * flows[s]
        flows = new
    torch.testing.assert_close(rollout(maps), flows)
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(4))
    assert shares(torch.zeros(1, 2, 2)).sum() == 0


def test_the_lens_ends_in_what_the_model_predicts() -> None:
    model = tiny("generation")
    batch = model._batch(["to be", "or not to be"], model.head.inputs)
    guesses, losses = guesses_by_layer(model, batch, 3), losses_by_layer(model, batch)
    assert len(guesses) == len(losses) == 3 and guesses[0].ids_BTK.shape == (2, 12, 3)
    for guess, loss in zip(guesses, losses, strict=True):
        assert float(-guess.target_BT.log().nansum()) == pytest.approx(loss, 1e-5)
    (answer,) = model.predict(["or not to be"], DecodingOptions(max_new_tokens=1, temperature=0.0))
    assert model.tokenizer is not None
    assert model.tokenizer.decode(guesses[-1].ids_BTK[1, -1, :1].tolist()) == answer["text"]


def test_pattern_scores() -> None:
    """Against sums over positions, one by one; a head that copies what followed scores 1."""
    L, T = 6, 12
    map_HTT = torch.rand(2, T, T, generator=torch.Generator().manual_seed(0)).tril() + torch.eye(T)
    map_HTT[1] = torch.eye(T)
    for t in range(L, T):
        map_HTT[1, t] = 0
        map_HTT[1, t, t - L + 1] = -3
    random, copying = pattern_scores(map_HTT[None], 7, ["a", "b"])
    assert (copying.layer, copying.head, copying.induction, copying.duplicate) == (7, "b", 1.0, 0.0)
    weights = map_HTT[0] / map_HTT[0].sum(-1, keepdim=True)
    mean = {
        "induction": [weights[t, t - L + 1] for t in range(L, T)],
        "previous": [weights[t, t - 1] for t in range(1, T)],
        "duplicate": [weights[t, t - L] for t in range(L, T)],
        "first": [weights[t, 0] for t in range(2, T)],
        "self": [weights[t, t] for t in range(T)],
    }
    for name, values in mean.items():
        assert getattr(random, name) == pytest.approx(float(sum(values)) / len(values), abs=1e-6), name
    assert (random.offset, random.at_offset) == (0, random.self)
    assert even_scores(L, causal=True).previous == pytest.approx(sum(1 / (t + 1) for t in range(1, T)) / (T - 1))
    assert even_scores(L, causal=False).induction == pytest.approx(1 / T)
    model = tiny("generation")
    ids = random_ids(Byte(), 3, 20)
    nats = [
        -float(row)
        for row in guesses_by_layer(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]})[-1].target_BT.log().mean(0)
    ]
    assert score_heads(model, ids).losses == pytest.approx((sum(nats[:19]) / 19, sum(nats[20:]) / 19), rel=1e-4)
    assert ids.shape == (3, 40) and torch.equal(ids[:, :20], ids[:, 20:])
    assert all(len(set(row[:20])) == 20 and min(row) >= 6 for row in ids.tolist())


def test_a_probe_recovers_a_planted_label_and_no_random_one() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (600,), generator=draw)
    states_LND = torch.randn(2, 600, 8, generator=draw)
    states_LND[1, :, 3] += 8.0 * labels
    items = Items(states_LND, [f"l{n}" for n in labels.tolist()], [f"w{n % 200}" for n in range(600)], list(range(600)))
    (first, second), most = probe(items)
    assert 0.35 < first.accuracy < 0.65 and 0.35 < most < 0.65
    assert second.accuracy > 0.97 and second.interval[0] > 0.9 and 0.35 < second.control < 0.65
    assert second.selectivity == second.accuracy - second.control
    with pytest.raises(UserError, match="at least two labels"):
        probe(Items(states_LND, ["same"] * 600, items.types, items.texts))


def test_the_states_that_a_probe_reads() -> None:
    """Of a text the mean state, of words the mean of their tokens, the same one by one as in a batch."""
    model = tiny("token_classification")
    net = model.network
    assert model.tokenizer is not None
    words = [["Ann", "is", "in", "Rome"], ["x" * 61, "yy", "z"]]
    items = items_of(model, [{"w": row, "t": list("abcd")[: len(row)]} for row in words], "w", "t")
    assert items.labels == ["a", "b", "c", "d", "a", "b"] and items.texts == [0] * 4 + [1] * 2
    assert items.types == ["Ann", "is", "in", "Rome", "x" * 61, "yy"]  # z does not fit
    ids = torch.tensor([model.tokenizer.encode("Ann is in Rome")])
    x_BTD = net.embedding(ids)
    torch.testing.assert_close(items.states_LND[0, 1], x_BTD[0, 3:6].mean(0))
    with watched(net.encoder[1]) as calls:
        net.encode(ids, Sequence.of(ids))
    torch.testing.assert_close(items.states_LND[2, 3], calls[0].y[0, 9:].mean(0))
    whole = items_of(model, [{"w": "Ann is in Rome", "t": 1}, {"w": "A", "t": 2}], "w", "t")
    torch.testing.assert_close(whole.states_LND[2, 0], calls[0].y[0].mean(0))
    assert whole.labels == ["1", "2"] and whole.types == ["Ann", "A"]
    with pytest.raises(UserError, match="row 1 has no column u; it has w, t"):
        items_of(model, [{"w": "a", "t": "b"}], "w", "u")
    with pytest.raises(UserError, match="row 1: w and t should be a text and a label, or lists of equal length"):
        items_of(model, [{"w": ["a", "b"], "t": ["c"]}], "w", "t")
    for wrong in (3, ["a", 3]):
        with pytest.raises(UserError, match="row 1: w should be a text or a list of words, got "):
            items_of(model, [{"w": wrong, "t": ["b", "c"] if isinstance(wrong, list) else "b"}], "w", "t")
    empty: tuple[list[dict[str, list[str]]], ...] = ([], [{"w": [], "t": []}])
    for none in empty:
        with pytest.raises(UserError, match="there is no text or word to probe"):
            items_of(model, none, "w", "t")
    (label,) = items_of(model, [{"w": [], "t": []}, {"w": ["a"], "t": ["b"]}], "w", "t").labels
    assert label == "b"


def test_which_tokens_are_explained() -> None:
    """One target by its place, the next token without one, and what is refused."""
    model = tiny("generation")
    batch = model._batch(["abcd"], model.head.inputs)
    net = model.network
    log = (net.decode(batch["ids"], Sequence.of(batch["ids"])) @ net.output_weight_VD.T).log_softmax(-1)[0]
    for at, place, target in [(1, 1, int(batch["ids"][0, 2])), (None, 3, int(log[3].argmax()))]:
        row = ScoredRow(model, "abcd", at)
        assert float(row.score(row.x_RTD[None])) == pytest.approx(float(log[place, target]), abs=1e-5)
        assert float(row.probability(row.x_RTD[None])) == pytest.approx(float(log[place, target].exp()), abs=1e-5)
    with pytest.raises(UserError, match="there is no target at 3; they are at 0, 1, 2"):
        ScoredRow(model, "abcd", 3)
    with pytest.raises(UserError, match="Classification has no target tokens"):
        ScoredRow(tiny("classification"), "abcd", 3)
    long = ScoredRow(model, "x" * 90 + "abcd")  # the end is read, as much as fits
    assert len(long.ids) <= 64 and long.tokens[-4:] == list("abcd")
    reader = tiny("question_answering")
    asked = {name: FIELDS[name][0] for name in reader.head.inputs}
    assert ScoredRow(reader, asked).count == 1
    translator = tiny("translation")
    answer = translator.predict(["a b"])[0]["text"]
    assert ScoredRow(translator, "a b").batch["reference"] == [answer]
