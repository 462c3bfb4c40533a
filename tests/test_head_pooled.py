"""The heads over one vector of a text: weights of classes, a decoder's last state, several labels, scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_heads import TEXTS, byte_tokenizer, items, network
from torch.distributions import Categorical, kl_divergence
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from llmkit.contracts import Head
from llmkit.errors import UserError
from llmkit.registry import plugin
from llmkit.sequence import Sequence
from llmkit.testing import check
from llmkit_plugins.head.classification import Classification
from llmkit_plugins.head.multi_label import MultiLabel
from llmkit_plugins.head.regression import Regression, ScoreMetric

LABELS = ["neg", "pos", "neg", "meh"]
SETS = [["a", "c"], ["b"], [], ["c", "a", "b"]]


def ready(head: Head, **columns: list[Any]) -> Head:
    head.learn(columns)
    torch.manual_seed(1)
    head.build(16, 262)
    with torch.no_grad():
        head.get_parameter("classifier.bias").normal_()
    return head.double().eval()


def outputs(head: Head, net: Any, text: str) -> torch.Tensor:
    """Return the head's linear layer on one text, read alone."""
    ids = torch.tensor([byte_tokenizer().encode(text)])
    seq = Sequence.dense(ids.shape[1])
    x_TD = net.encode(ids, seq).x_BSD[0] if head.topology == "encoder" else net.decode(ids, seq)[0]
    pooled = x_TD.mean(0) if head.topology == "encoder" else x_TD[-1]
    scores: torch.Tensor = head.get_parameter("classifier.weight") @ pooled + head.get_parameter("classifier.bias")
    return scores


@torch.no_grad()
@pytest.mark.parametrize("topology", ["encoder", "decoder"])
@pytest.mark.parametrize("weights", [None, "balanced", {"neg": 3.0, "meh": 0.25}])
def test_class_weights(weights: Any, topology: Any) -> None:
    head = ready(Classification(class_weights=weights, topology=topology), label=LABELS)
    net = network(head)
    numbers = {"meh": 0, "neg": 1, "pos": 2}
    # balanced: 4 texts, 3 labels, counts 1, 2, 1
    weight = [4 / 3, 2 / 3, 4 / 3] if weights == "balanced" else [0.25, 3, 1] if weights else [1, 1, 1]
    rows = items(head, byte_tokenizer(), text=TEXTS, label=LABELS)
    found = head.loss(net, head.collate(rows, byte_tokenizer()))
    expected = sum(
        float(-outputs(head, net, text).log_softmax(0)[numbers[label]]) * weight[numbers[label]]
        for text, label in zip(TEXTS, LABELS, strict=True)
    )
    assert float(found.total) == pytest.approx(expected, rel=1e-6) and float(found.count) == 4
    metrics: dict[str, Any] = head.metrics("validation")
    head.evaluate(net, head.collate(rows, byte_tokenizer()), metrics, byte_tokenizer())
    plain = sum(
        float(-outputs(head, net, text).log_softmax(0)[numbers[label]])
        for text, label in zip(TEXTS, LABELS, strict=True)
    )
    assert float(metrics["loss"].compute()) == pytest.approx(plain / 4, rel=1e-6)  # weights do not change the measure
    again = Classification(class_weights=weights, topology=topology)
    again.set_info(head.info())
    again.build(16, 262)
    assert again.info() == head.info()


def test_class_weights_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"class_weights: unknown label 'nag'\. Did you mean 'neg'\?"):
        Classification(class_weights={"nag": 1.0}).learn({"label": LABELS})
    with pytest.raises(UserError, match=r"class_weights: the weight of 'neg' must be 0 or more, got -1"):
        Classification(class_weights={"neg": -1.0})
    head = Classification(class_weights="balanced")
    head.set_info({"labels": ["a", "b"]})
    with pytest.raises(UserError, match="does not say how often each label occurs"):
        head.build(16, 262)


def test_r_drop() -> None:
    """Two passes with dropout of their own: the mean of their losses, and how far their answers are apart."""
    weights = {"neg": 3.0, "meh": 0.25}
    head = ready(Classification(dropout=0.5, class_weights=weights, label_smoothing=0.1, r_drop=0.7), label=LABELS)
    net = network(head)
    batch = head.collate(items(head, byte_tokenizer(), text=TEXTS, label=LABELS), byte_tokenizer())
    once = ready(Classification(class_weights=weights, label_smoothing=0.1), label=LABELS)
    once.load_state_dict(head.state_dict())
    assert torch.equal(head.loss(net, batch).total, once.loss(net, batch).total)  # while it does not train
    head.train()
    torch.manual_seed(2)
    found = head.loss(net, batch)
    torch.manual_seed(2)
    answers = [head.get_submodule("dropout")(pooled_states(net, batch)) for _ in range(2)]
    scores = [F.linear(x, *(head.get_parameter(f"classifier.{name}") for name in ("weight", "bias"))) for x in answers]
    weight = torch.tensor([0.25, 3.0, 1.0], dtype=torch.float64)
    losses = [F.cross_entropy(one, batch["label"], weight, reduction="sum", label_smoothing=0.1) for one in scores]
    p, q = (Categorical(logits=one) for one in scores)
    apart = (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 2
    assert float(apart) > 0.1
    assert float(found.total) == pytest.approx(float(sum(losses) / 2 + 0.7 * apart), rel=1e-9)
    assert float(found.count) == 4
    with pytest.raises(UserError, match="r_drop must be 0 or more, got -1"):
        Classification(r_drop=-1)


def pooled_states(net: Any, batch: Any) -> torch.Tensor:
    """Return the mean of each text's states, (B, D)."""
    real_BT1 = (batch["segments"] > 0).double()[..., None]
    states: torch.Tensor = net.encode(batch["ids"], Sequence.of(batch["ids"], batch["segments"])).x_BSD
    mean: torch.Tensor = (states * real_BT1).sum(1) / real_BT1.sum(1)
    return mean


def test_a_decoder_passes_the_checks() -> None:
    report = check("head", plugin("head", "classification", topology="decoder"))
    assert not report.failed, str(report)


@torch.no_grad()
def test_multi_label_against_plain_computations() -> None:
    head = ready(MultiLabel(), labels=SETS)
    net, tokenizer = network(head), byte_tokenizer()
    scores = torch.stack([outputs(head, net, text) for text in TEXTS])
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    batch = head.collate(items(head, tokenizer, text=TEXTS, labels=SETS), tokenizer)
    found = head.loss(net, batch)
    total = F.binary_cross_entropy_with_logits(scores, expected.double(), reduction="sum")
    assert float(found.total) == pytest.approx(float(total), rel=1e-6) and float(found.count) == 12
    metrics: dict[str, Any] = head.metrics("test")
    head.evaluate(net, batch, metrics, tokenizer)
    for name, other in {
        "micro_f1": MultilabelF1Score(3, average="micro"),
        "macro_f1": MultilabelF1Score(3, average="macro"),
        "exact_match": MultilabelExactMatch(3),
    }.items():
        assert float(metrics[name].compute()) == pytest.approx(float(other(scores.float(), expected)), rel=1e-6)
    answers = head.predict(net, head.collate(items(head, tokenizer, text=TEXTS), tokenizer), tokenizer, head.decoding)
    for answer, row in zip(answers, scores.sigmoid().tolist(), strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(row, rel=1e-6)
        assert set(answer["labels"]) == {label for label, chance in zip("abc", row, strict=True) if chance > 0.5}
    assert head.show({"labels": ["a"], "probabilities": {"a": 0.75}}) == "a 0.7500"


def test_labels_in_one_text() -> None:
    head = ready(MultiLabel(separator=";"), labels=["b; a", "", "c", "a ;a;"])
    rows = items(head, byte_tokenizer(), text=TEXTS, labels=["b; a", "", "c", "a ;a;"])
    assert [row["labels"] for row in rows] == [[0, 1], [], [2], [0]]


SCORES = [100.5, "101.25", 99, 100.5]


@torch.no_grad()
def test_regression_against_plain_computations() -> None:
    head = ready(Regression(), score=SCORES)
    net, tokenizer = network(head), byte_tokenizer()
    target = torch.tensor([100.5, 101.25, 99, 100.5], dtype=torch.float64)
    assert head.info() == pytest.approx({"mean": float(target.mean()), "deviation": float(target.std(correction=0))})
    predicted = torch.stack([outputs(head, net, text)[0] for text in TEXTS])
    batch = head.collate(items(head, tokenizer, text=TEXTS, score=SCORES), tokenizer)
    found = head.loss(net, batch)
    total = float((predicted - (target - target.mean()) / target.std(correction=0)).square().sum())
    assert float(found.total) == pytest.approx(total, rel=1e-6) and float(found.count) == 4
    metrics: dict[str, Any] = head.metrics("test")
    head.evaluate(net, batch, metrics, tokenizer)
    assert float(metrics["loss"].compute()) == pytest.approx(total / 4, rel=1e-6)
    in_unit = target.mean() + target.std(correction=0) * predicted
    answers = head.predict(net, head.collate(items(head, tokenizer, text=TEXTS), tokenizer), tokenizer, head.decoding)
    assert [answer["score"] for answer in answers] == pytest.approx(in_unit.tolist(), rel=1e-9)
    assert float(metrics["mse"].compute()) == pytest.approx(float(F.mse_loss(in_unit, target)), rel=1e-9)
    for name, other in (("pearson", PearsonCorrCoef()), ("spearman", SpearmanCorrCoef())):
        assert float(metrics[name].compute()) == pytest.approx(float(other(predicted, target)), rel=1e-6)


def test_correlations_of_ties_constants_and_in_half_precision() -> None:
    rng = torch.Generator().manual_seed(0)
    predicted = torch.randn(200, generator=rng, dtype=torch.float64)
    expected = (2 * predicted + torch.randn(200, generator=rng)).round()  # with ties
    for kind, other in ((ScoreMetric("pearson"), PearsonCorrCoef()), (ScoreMetric("spearman"), SpearmanCorrCoef())):
        metric: Any = torch.nn.ModuleList([kind]).to(torch.bfloat16)[0]
        metric.update(predicted[:150], expected[:150])
        metric.to(torch.bfloat16)
        metric.update(predicted[150:], expected[150:])
        assert float(metric.compute()) == pytest.approx(float(other(predicted, expected)), rel=1e-6)
        metric.reset()
        metric.update(predicted, torch.ones(200))
        assert math.isnan(float(metric.compute()))


def test_options() -> None:
    for words, says in (({"threshold": 1.0}, "threshold must be above 0"), ({"separator": ""}, "must not be empty")):
        with pytest.raises(UserError, match=says):
            MultiLabel(**words)
    assert Regression().show({"score": 1.5}) == "1.5000"
