"""Checks of heads: correct ones pass, broken ones are caught."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from llmkit import registry
from llmkit.contracts import IGNORE, Batch, Head, Loss, Network, Stage, Tokenizer, Topology
from llmkit.ops.metrics import MeanLoss
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of
from llmkit.testing import check


@pytest.mark.parametrize("name", registry.entries("head"))
def test_first_party(name: str) -> None:
    report = check("head", name)
    assert not report.failed, str(report)
    idle = {result.name for result in report.results if result.status == "n/a"}
    assert idle <= {"reference", "last_block"}


class Labels(Head):
    """Right: one label a text, from the sum of the states."""

    topology = "encoder"
    inputs = ("text",)
    targets = ("label",)
    texts = ("text",)
    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        self.labels = sorted(set(columns["label"]))

    def info(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def set_info(self, info: dict[str, Any]) -> None:
        self.labels = info["labels"]

    def build(self, dim: int, vocab_size: int) -> None:
        self.out = nn.Linear(dim, len(self.labels))

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        ids = [row[:max_length] for row in tokenizer.encode_batch(rows["text"])]
        features: dict[str, list[Any]] = {"ids": ids, "length": [len(row) for row in ids]}
        if "label" in rows:
            features["label"] = [self.labels.index(label) for label in rows["label"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        rows = [feature["ids"] for feature in features]
        segments = segments_of([len(row) for row in rows])
        batch = {"ids": padded(rows, tokenizer.pad_id)}
        batch["segments"] = torch.ones_like(batch["ids"]) if segments is None else segments
        if "label" in features[0]:
            batch["label"] = torch.tensor([feature["label"] for feature in features])
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"], batch["segments"])).x_BSD
        scores: Tensor = self.out((x_BTD * batch["segments"][..., None].to(x_BTD.dtype)).sum(1) / 8)
        return scores

    def loss(self, net: Network, batch: Batch) -> Loss:
        total = F.cross_entropy(self.scores(net, batch), batch["label"], reduction="sum")
        return Loss(total, torch.tensor(len(batch["label"])))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": MeanLoss(), "accuracy": MulticlassAccuracy(len(self.labels), average="micro")}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["loss"].update(self.loss(net, batch))
        metrics["accuracy"].update(self.scores(net, batch), batch["label"])

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        return [{"label": self.labels[best]} for best in self.scores(net, batch).argmax(-1).tolist()]


class NextToken(Head):
    """Right: a language model over blocks that has no layers of its own, and no metric called loss."""

    topology: ClassVar[Topology] = "decoder"
    layout = "blocks"
    inputs = ("text",)
    texts = ("text",)
    monitor = ("nats", "min")

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        return {"ids": tokenizer.encode_batch(rows["text"])}

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        ids = [feature["ids"] for feature in features]
        return {"ids": padded(ids, tokenizer.pad_id), "length": torch.tensor([len(row) for row in ids])}

    def loss(self, net: Network, batch: Batch) -> Loss:
        x_BTD = net.decode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments")))
        scores = (x_BTD @ net.output_weight_VD.to(x_BTD.dtype).T).flatten(0, 1).double()
        total = F.cross_entropy(scores, batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
        return Loss(total, (batch["targets"] != IGNORE).sum())

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"nats": MeanLoss()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["nats"].update(self.loss(net, batch))

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        ids, lengths = batch["ids"][:, : net.max_length], batch["length"].clamp(max=net.max_length)
        x_BTD = net.decode(ids, Sequence.dense(ids.shape[1]))
        last = x_BTD[torch.arange(len(x_BTD)), lengths - 1] @ net.output_weight_VD.T
        return [{"next": tokenizer.decode([best])} for best in last[:, 6:].argmax(-1).add(6).tolist()]

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        return None


class Score(Labels):
    """Right: a number for a text; its field is its own."""

    targets = ("grade",)
    monitor = ("loss", "min")

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        self.labels = ["score"]

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        features = super().encode({"text": rows["text"]}, tokenizer, max_length)
        if "grade" in rows:
            features["label"] = [round(1000 * score) for score in rows["grade"]]
        return features

    def loss(self, net: Network, batch: Batch) -> Loss:
        total = (self.scores(net, batch)[:, 0] - batch["label"] / 1000).square().sum()
        return Loss(total, torch.tensor(len(batch["label"])))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": MeanLoss()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["loss"].update(self.loss(net, batch))

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        return [{"score": score} for score in self.scores(net, batch)[:, 0].tolist()]


@pytest.mark.parametrize("cls", [Labels, NextToken])
def test_unusual_but_right(cls: type[Head]) -> None:
    report = check("head", cls)
    assert not report.failed, str(report)


def test_own_fields_need_rows() -> None:
    report = check("head", Score)
    assert not report.failed
    assert [result.name for result in report.results if result.status == "pass"] == ["declares"]
    assert report.results[1].detail == "no example rows for grade: pass rows={field: [values]}"
    rows = {"text": ["a b", "one two three", "c d", "and so on and so on"], "grade": [0.5, -1.25, 3.0, 0.0]}
    report = check("head", Score, rows=rows)
    assert not report.failed and sum(result.status == "n/a" for result in report.results) == 2, str(report)


def test_rows_that_do_not_fit_are_named() -> None:
    rows = {"text": ["a"], "grade": ["high"]}
    found = {result.name: result.detail for result in check("head", Score, rows=rows).failed}
    assert found.keys() == {"encodes"} and "raised TypeError" in found["encodes"] and "text 'a'" in found["encodes"]


def test_reference() -> None:
    def plain(head: Any, net: Network, row: dict[str, Any], tokenizer: Tokenizer) -> tuple[float, float]:
        ids = torch.tensor([tokenizer.encode(row["text"])])
        state_D = net.encode(ids, Sequence.dense(ids.shape[1])).x_BSD[0].sum(0) / 8
        logits = [float(weight @ state_D + bias) for weight, bias in zip(head.out.weight, head.out.bias, strict=True)]
        chances = torch.tensor(logits, dtype=torch.float64).softmax(-1)
        return -float(chances[head.labels.index(row["label"])].log()), 1

    only = ["loss", "reference"]
    assert [result.status for result in check("head", Labels, reference=plain, only=only).results] == ["pass", "pass"]
    (failed,) = check("head", Smoothed, reference=plain, only=only).failed
    assert failed.name == "reference" and "row 0 (text 'a [MASK]'): loss" in failed.detail


# --- broken ones


class Smoothed(Labels):
    def loss(self, net: Network, batch: Batch) -> Loss:
        total = F.cross_entropy(self.scores(net, batch), batch["label"], reduction="sum", label_smoothing=0.1)
        return Loss(total, torch.tensor(len(batch["label"])))


class MeanOverBatch(NextToken):
    """The mean over all positions of the batch, padding counted."""

    def loss(self, net: Network, batch: Batch) -> Loss:
        return Loss(super().loss(net, batch).total / batch["ids"].numel(), torch.tensor(1))


class NoSegments(Labels):
    """Padding is read by the encoder."""

    def scores(self, net: Network, batch: Batch) -> Tensor:
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"])).x_BSD
        scores: Tensor = self.out((x_BTD * batch["segments"][..., None].to(x_BTD.dtype)).sum(1) / 8)
        return scores


class CountsPadding(NextToken):
    """Padding is predicted: targets of the batch's own making."""

    def loss(self, net: Network, batch: Batch) -> Loss:
        return super().loss(net, {**batch, "targets": batch["ids"].roll(-1, 1)})


class ReadsLastBlock(NextToken):
    """An encoder's language model that reads the padding of the last block."""

    topology = "encoder"

    def loss(self, net: Network, batch: Batch) -> Loss:
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"], batch.get("segments"))).x_BSD
        scores = (x_BTD @ net.output_weight_VD.to(x_BTD.dtype).T).flatten(0, 1).double()
        total = F.cross_entropy(scores, batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
        return Loss(total, (batch["targets"] != IGNORE).sum())

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        return [{} for _ in batch["ids"]]


class MinusBatchMean(Labels):
    def scores(self, net: Network, batch: Batch) -> Tensor:
        scores = super().scores(net, batch)
        return scores - scores.mean(0)


class MeanOfBatches(Labels):
    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": MeanLoss(), "accuracy": MeanMetric()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["loss"].update(self.loss(net, batch))
        metrics["accuracy"].update((self.scores(net, batch).argmax(-1) == batch["label"]).double().mean())


class MeanLossOfBatches(Labels):
    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {**super().metrics(stage), "loss": MeanMetric()}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        loss = self.loss(net, batch)
        metrics["loss"].update(loss.total)
        metrics["accuracy"].update(self.scores(net, batch), batch["label"])


class Hits(Metric):
    """A share whose states are summed, unless ``reduce`` says otherwise."""

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    count: Tensor

    def __init__(self, reduce: str = "sum", states: bool = True) -> None:
        super().__init__()
        self.seen = 0
        self.states = states
        self.add_state("hits", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx=reduce)

    def update(self, right: Tensor) -> None:
        self.hits += right.sum()
        self.count += right.numel()
        self.seen += right.numel()

    def compute(self) -> Tensor:
        return self.hits / (self.count if self.states else self.seen)


class NoReset(Labels):
    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": MeanLoss(), "accuracy": Hits(states=False)}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        metrics["loss"].update(self.loss(net, batch))
        metrics["accuracy"].update(self.scores(net, batch).argmax(-1) == batch["label"])


class WrongReduction(NoReset):
    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        return {"loss": MeanLoss(), "accuracy": Hits("max")}


class WrongSide(Labels):
    monitor = ("accuracy", "min")


class NoMonitor(Labels):
    monitor = ("f1", "max")


class DropsRow(Labels):
    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        return [answer for answer in super().predict(net, batch, tokenizer, options) if answer["label"] != "meh"][:4]


class Sorts(Labels):
    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        scores = self.scores(net, batch).sort(0).values
        return [{"scores": row} for row in scores.tolist()]


class Tensors(Labels):
    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        return [{"scores": row} for row in self.scores(net, batch)]


class Peeks(Labels):
    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        answers = super().predict(net, batch, tokenizer, options)
        if "label" not in batch:
            return answers
        return [{"label": self.labels[number]} for number in batch["label"].tolist()]


class NeedsTargets(Labels):
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        return super().encode({"text": rows["text"], "label": rows["label"]}, tokenizer, max_length)


class NeighboursInEncode(Labels):
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        features = super().encode(rows, tokenizer, max_length)
        return {**features, "length": [max(features["length"])] * len(features["length"])}


class Forgets(Labels):
    def info(self) -> dict[str, Any]:
        return {"count": len(self.labels)}

    def set_info(self, info: dict[str, Any]) -> None:
        self.labels = [str(number) for number in range(info["count"])]


class OneString(Labels):
    inputs = "text"  # type: ignore[assignment]


class Idle(Labels):
    def build(self, dim: int, vocab_size: int) -> None:
        super().build(dim, vocab_size)
        self.gate = nn.Linear(dim, dim)


class Unset(Labels):
    def build(self, dim: int, vocab_size: int) -> None:
        super().build(dim, vocab_size)
        self.out.bias = nn.Parameter(torch.empty(len(self.labels)))


class LooksInside(Labels):
    def loss(self, net: Any, batch: Batch) -> Loss:
        return Loss(super().loss(net, batch).total + 0 * net.embedding.weight.sum(), torch.tensor(1))


class AlwaysDropout(Labels):
    def scores(self, net: Network, batch: Batch) -> Tensor:
        return F.dropout(super().scores(net, batch), 0.5)


class Uncut(Labels):
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        return super().encode(rows, tokenizer, 10**6)


class StaysInTraining(Labels):
    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        super().evaluate(net, batch, metrics, tokenizer)
        self.train()


class Hidden(Labels):
    """A random matrix that is neither parameter nor buffer."""

    def build(self, dim: int, vocab_size: int) -> None:
        super().build(dim, vocab_size)
        self.matrix = [torch.randn(len(self.labels), len(self.labels))]

    def scores(self, net: Network, batch: Batch) -> Tensor:
        scores = super().scores(net, batch)
        return scores @ self.matrix[0].to(scores)


class SinglePrecision(Labels):
    def scores(self, net: Network, batch: Batch) -> Tensor:
        x_BTD = net.encode(batch["ids"], Sequence.of(batch["ids"], batch["segments"])).x_BSD
        if x_BTD.dtype == torch.bfloat16:
            x_BTD = x_BTD.float()
        scores: Tensor = self.out((x_BTD * batch["segments"][..., None]).sum(1) / 8)
        return scores


class WrongGradient(Labels):
    """Values as they should be, gradients twice as large."""

    def loss(self, net: Network, batch: Batch) -> Loss:
        found = super().loss(net, batch)
        return Loss(2 * found.total - found.total.detach(), found.count)


METRICS = {"metrics_in_any_batch", "metrics_of_processes"}
BROKEN: list[tuple[type[Any], set[str], str]] = [
    (MeanOverBatch, {"loss_is_a_sum", "loss_in_any_batch", "last_block", *METRICS}, "for 2 copies; a mean"),
    (
        NoSegments,
        {"loss_in_any_batch", "padding_value", "answers_in_any_batch", "loss_metric", *METRICS},
        "Padding that counts, or is read",
    ),
    (CountsPadding, {"loss_in_any_batch", "padding_value", "last_block", *METRICS}, "as one batch: loss"),
    (ReadsLastBlock, {"last_block"}, "the first one padded: loss"),
    (
        MinusBatchMean,
        {"loss_in_any_batch", "answers_in_any_batch", "loss_metric", *METRICS},
        "as one batch: loss 2.* over 2; one by one 2.* over 2",
    ),
    (MeanOfBatches, METRICS, r"rows in batches \[\[0\], \[1, 2, 3, 4\]\] against all at once: 'accuracy'"),
    (MeanLossOfBatches, {"loss_metric", *METRICS}, "weighted by loss.count"),
    (NoReset, METRICS, r"after reset, rows \[[\d, ]+\]: 'accuracy'"),
    (WrongReduction, {"metrics_of_processes"}, r"rows \[0, 1\] in one process, \[2, 3, 4\] in another.* 'accuracy'"),
    (WrongSide, {"metrics"}, r"monitor is \('accuracy', 'min'\), but MulticlassAccuracy is better at the max"),
    (NoMonitor, {"metrics"}, "monitor is 'f1', but the validation metrics are loss, accuracy"),
    (DropsRow, {"answers"}, "5 rows got [1-4] answers"),
    (Sorts, {"answers_in_any_batch"}, "rows in another order"),
    (Tensors, {"answers"}, "is not JSON"),
    (Peeks, {"answers"}, "but with targets"),
    (NeedsTargets, {"encodes"}, "without targets encode raised KeyError: 'label'"),
    (NeighboursInEncode, {"encodes"}, "feature 'length' of row 0 .* is 39 in a batch of 5, and .8. alone"),
    (Forgets, {"learns"}, "'neg' is not in list"),
    (OneString, {"declares"}, r"inputs is 'text', .* A tuple of one is written \('text',\)"),
    (Idle, {"every_parameter_learns"}, r"'head.gate.weight' \(16, 16\) is not used"),
    (Unset, {"weights_are_set"}, r"100% of 'head.out.bias' \(3,\) is not initialised"),
    (LooksInside, {"loss"}, "'ContractNetwork' object has no attribute 'embedding'"),
    (Uncut, {"long_rows"}, "columns at once; the context is 64"),
    (StaysInTraining, {"changes_nothing"}, "leaves it in training mode"),
    (WrongGradient, {"gradients"}, "autograd and finite differences disagree"),
    (Hidden, {"state_dict"}, "a random tensor that is neither parameter nor buffer"),
    (SinglePrecision, {"bfloat16"}, "must have the same dtype"),
]


@pytest.mark.usefixtures("no_jacobians")
@pytest.mark.parametrize(("cls", "expected", "message"), BROKEN)
def test_broken(cls: type[Head], expected: set[str], message: str) -> None:
    report = check("head", cls)
    found = {result.name: result.detail for result in report.failed}
    assert found.keys() == expected, str(report)
    assert any(re.search(message, detail) for detail in found.values()), str(report)


def test_chance_in_eval_mode() -> None:
    report = check("head", AlwaysDropout, only=["deterministic"])
    assert [result.name for result in report.failed] == ["deterministic"]
