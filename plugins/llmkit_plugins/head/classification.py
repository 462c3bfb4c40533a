"""Labelling a text with one of several classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from llmkit.contracts import Batch, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError, unknown
from llmkit.ops.distillation import Logits, SoftTargets, distilled
from llmkit.ops.metrics import MeanLoss
from llmkit.sequence import DecodingOptions, moved
from llmkit_plugins.head.labels import ClassNumbers, class_name, count_classes, refuse_scores
from llmkit_plugins.head.pooled import Pool, Pooled


class Classification(Pooled):
    """Text classification with one label a text: a linear layer over the mean of the encoder's states.

    Args:
        dropout: dropout before the linear layer.
        label_smoothing: share of the probability spread evenly over the labels while training.
        class_weights: how much the loss of a text with a label counts in training, by label; 1 for those not named.
            ``balanced``: inversely to how often each label occurs, 1 on average, so that all labels count the same.
        topology: ``encoder``, or ``decoder``: a causal network, whose state at the last token is used. It takes all
            weights of a language model (``model.init_from``) and any causal variant.
        pool: which vector of an encoder's states is read: their ``mean``, the ``first`` (that of ``[CLS]``), or the
            first through BERT's ``pooler``, a linear layer and tanh.
        pair: whether a row has a second text, in the field ``text_pair``.
        r_drop: weight of R-Drop (Liang et al. 2021, arXiv:2106.14448): in training each text passes through the network
            twice, with dropout of its own each time, and the divergence between the two answers, the mean of both
            directions, is added to the mean of the two losses. A step costs twice as much; without dropout nothing
            else changes.
    """

    targets = ("label",)
    classes = ("label",)
    monitor = ("accuracy", "max")

    def __init__(
        self,
        dropout: float = 0.1,
        label_smoothing: float = 0.0,
        class_weights: dict[str, float] | Literal["balanced"] | None = None,
        topology: Literal["encoder", "decoder"] = "encoder",
        pool: Pool = "mean",
        pair: bool = False,
        r_drop: float = 0.0,
    ) -> None:
        super().__init__(dropout, topology, pool, pair)
        if not (r_drop >= 0 and math.isfinite(r_drop)):
            raise UserError(f"r_drop must be 0 or more, got {r_drop}")
        self.r_drop, self.passes = r_drop, 2 if r_drop else 1
        for label, weight in ({} if class_weights == "balanced" else class_weights or {}).items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"class_weights: the weight of '{label}' must be 0 or more, got {weight}")
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.labels: list[str] = []
        self.counts: list[int] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take the label names from the training rows, sorted, and how often each occurs if weights need that."""
        counts = count_classes(columns["label"])
        refuse_scores(counts)
        self.labels = list(counts)
        if self.class_weights == "balanced":
            self.counts = list(counts.values())
        if len(self.labels) < 2:
            raise UserError(f"classification needs at least two labels; the training data has only {self.labels}")
        self._weights()

    def info(self) -> dict[str, Any]:
        """Return the label names, and how often each occurs if weights need that."""
        return {"labels": self.labels, **({"counts": self.counts} if self.counts else {})}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore the label names. Raises TypeError when they are not texts."""
        "".join(info["labels"])
        self.labels, self.counts = list(info["labels"]), [int(count) for count in info.get("counts", [])]

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from the mean state to the labels."""
        self._weights()  # refuses those that do not fit the labels
        self._build(dim, len(self.labels))

    def _weights(self) -> list[float] | None:
        """Return the weight of each label. Raises UserError for a weight without a label."""
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            if not self.counts:
                raise UserError(
                    "class_weights: the checkpoint does not say how often each label occurs: name the weights"
                )
            return [sum(self.counts) / (len(self.counts) * count) for count in self.counts]
        given = {class_name(label): weight for label, weight in self.class_weights.items()}
        for label in given:
            if label not in self.labels:
                raise UserError(f"class_weights: {unknown('label', label, self.labels)}")
        return [given.get(label, 1.0) for label in self.labels]

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length``, ``truncated`` and, when it is known, ``label``."""
        features = self._encode(rows, tokenizer, max_length)
        if "label" in rows:
            numbers = ClassNumbers(self.labels)
            features["label"] = [numbers[label] for label in rows["label"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), segments (B, T) where padded, and label (B,)."""
        batch = super().collate(features, tokenizer)
        if "label" in features[0]:
            batch["label"] = torch.tensor([feature["label"] for feature in features])
        return batch

    def logits(self, net: Network, batch: Batch) -> Logits:
        """Return the scores of the labels, for distillation."""
        return Logits(self.dropout(self._pooled(net, batch)), self.classifier.weight, self.classifier.bias)

    def loss(self, net: Network, batch: Batch, soft: SoftTargets | None = None) -> Loss:
        """Return the summed, smoothed cross-entropy of the labels, weighted; the count is that of the texts.

        A teacher's scores are mixed in, without weights.
        """
        found = [self.scores(net, batch) for _ in range(self.passes if self.training else 1)]
        losses = [self._loss(scores, batch["label"], self.label_smoothing, self._weights()) for scores in found]
        if soft is not None:
            losses = [Loss(distilled(one.total, x, soft), one.count) for one, x in zip(losses, found, strict=True)]
        if len(losses) == 1:
            return losses[0]
        mean = (losses[0].total + losses[1].total) / 2
        return Loss(mean + self.r_drop * divergence(*found), losses[0].count)

    def _loss(self, scores: Tensor, label: Tensor, smoothing: float = 0.0, weights: list[float] | None = None) -> Loss:
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weight = None if weights is None else moved(torch.tensor(weights, dtype=exact.dtype), exact.device)
        total = F.cross_entropy(exact, label, weight, reduction="sum", label_smoothing=smoothing)
        return Loss(total, torch.full((), len(label), device=label.device))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss (not smoothed), accuracy and macro F1; on the test data the confusion matrix too."""
        classes = len(self.labels)
        metrics: dict[str, nn.Module] = {
            "loss": MeanLoss(),
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
        }
        if stage == "test":
            metrics["confusion_matrix"] = MulticlassConfusionMatrix(classes)
        return metrics

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        scores = self.scores(net, batch)
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(self._loss(scores, batch["label"], 0.0))
            else:
                metric.update(scores, batch["label"])

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return ``label``, its ``probability`` and all ``probabilities`` of each row."""
        answers = []
        for row in self.scores(net, batch).float().softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            probabilities = dict(zip(self.labels, row, strict=True))
            answers.append({"label": self.labels[best], "probability": row[best], "probabilities": probabilities})
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        """Return the label and its probability."""
        return f"{answer['label']}\t{answer['probability']:.4f}"


def divergence(scores: Tensor, others: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergences between two answers to each row, the mean of both directions, summed."""
    exact = torch.promote_types(scores.dtype, torch.float32)
    p, q = scores.to(exact).log_softmax(-1), others.to(exact).log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2
