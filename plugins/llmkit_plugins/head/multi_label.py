"""Labelling a text with any number of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.contracts import Batch, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.metrics import MeanLoss, MeanScore
from llmkit.sequence import DecodingOptions
from llmkit_plugins.head.labels import ClassNumbers, accepted, count_classes
from llmkit_plugins.head.pooled import Pool, Pooled


class MultiLabel(Pooled):
    """Text classification with any number of labels a text, none included: a yes or no for each label.

    ``labels`` is a list of labels or, with a ``separator``, a text of them; an empty one has none.

    Args:
        dropout: dropout before the linear layer.
        separator: what stands between the labels of a text, for data without lists (CSV).
        threshold: a label is predicted when its probability is above this.
        topology: ``encoder``, or ``decoder``: a causal network, whose state at the last token is used. It takes all
            weights of a language model (``model.init_from``) and any causal variant.
        pool: which vector of an encoder's states is read: their ``mean``, the ``first`` (that of ``[CLS]``), or the
            first through BERT's ``pooler``, a linear layer and tanh.
        pair: whether a row has a second text, in the field ``text_pair``.
    """

    targets = ("labels",)
    classes = ("labels",)
    monitor = ("micro_f1", "max")

    def __init__(
        self,
        dropout: float = 0.1,
        separator: str | None = None,
        threshold: float = 0.5,
        topology: Literal["encoder", "decoder"] = "encoder",
        pool: Pool = "mean",
        pair: bool = False,
    ) -> None:
        super().__init__(dropout, topology, pool, pair)
        if separator == "":
            raise UserError("multi_label: separator must not be empty")
        if not 0 < threshold < 1:
            raise UserError(f"multi_label: threshold must be above 0 and below 1, got {threshold}")
        self.separator, self.threshold = separator, threshold
        self.labels: list[str] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take the label names from the training rows, sorted."""
        rows = (labels for _, labels in accepted(columns["labels"], self._split))
        self.labels = list(count_classes(label for labels in rows for label in labels))
        if not self.labels:
            raise UserError("multi_label: the training data has no label")

    def _split(self, labels: Any) -> list[Any]:
        """Return the labels of a row. Raises UserError for a value that is not a list of labels."""
        if isinstance(labels, list):
            return labels
        if not isinstance(labels, str):
            need = "the head classification is for one label a text (model.head: classification)"
            raise UserError(f"the labels are {labels!r:.60}, expected a list: {need}")
        if self.separator is None:
            need = "a list of labels, or a text with model.head.separator, the sign between its labels"
            raise UserError(f"the labels are the text {labels!r:.60}, expected {need}")
        return [label for label in labels.split(self.separator) if label.strip()]

    def info(self) -> dict[str, Any]:
        """Return the label names."""
        return {"labels": self.labels}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore the label names. Raises TypeError when they are not texts."""
        "".join(info["labels"])
        self.labels = list(info["labels"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from the pooled state to the labels."""
        self._build(dim, len(self.labels))

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length``, ``truncated`` and, when they are known, ``labels``."""
        features = self._encode(rows, tokenizer, max_length)
        if "labels" in rows:
            numbers = ClassNumbers(self.labels)
            features["labels"] = [sorted({numbers[label] for label in self._split(row)}) for row in rows["labels"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), segments (B, T) where padded, and labels (B, L), 1 where a text has the label."""
        batch = super().collate(features, tokenizer)
        if "labels" in features[0]:
            batch["labels"] = torch.zeros(len(features), len(self.labels), dtype=torch.long)
            for row, feature in zip(batch["labels"], features, strict=True):
                row[feature["labels"]] = 1
        return batch

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed binary cross-entropy of all labels of all texts."""
        return self._loss(self.scores(net, batch), batch["labels"])

    def _loss(self, scores: Tensor, labels: Tensor) -> Loss:
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        total = F.binary_cross_entropy_with_logits(exact, labels.to(exact.dtype), reduction="sum")
        return Loss(total, torch.full((), labels.numel(), device=labels.device))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, micro and macro F1, and the share of texts with exactly the right labels."""
        labels = len(self.labels)
        return {
            "loss": MeanLoss(),
            "micro_f1": LabelF1(labels, "micro"),
            "macro_f1": LabelF1(labels, "macro"),
            "exact_match": MeanScore(),
        }

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        scores, labels = self.scores(net, batch), batch["labels"]
        metrics["loss"].update(self._loss(scores, labels))
        predicted, expected = self._probabilities(scores) > self.threshold, labels.bool()
        metrics["micro_f1"].update(predicted, expected)
        metrics["macro_f1"].update(predicted, expected)
        right = (predicted == expected).all(1)
        metrics["exact_match"].update(right.sum(), len(right))

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).sigmoid()

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return the ``labels`` of each row, most probable first, and all ``probabilities``."""
        answers = []
        for row in self._probabilities(self.scores(net, batch)).tolist():
            chances = dict(zip(self.labels, row, strict=True))
            found = sorted((label for label in chances if chances[label] > self.threshold), key=lambda x: -chances[x])
            answers.append({"labels": found, "probabilities": chances})
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        """Return the labels with their probabilities."""
        return ", ".join(f"{label} {answer['probabilities'][label]:.4f}" for label in answer["labels"]) or "(none)"


class LabelF1(Metric):
    """F1 of several labels, 0 to 1: of all decisions together (micro), or the mean of the labels' own F1 (macro).

    A label that is neither predicted nor in the references has the F1 0, as in scikit-learn.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, num_labels: int, average: Literal["micro", "macro"]) -> None:
        super().__init__()
        self.average = average
        self.add_state("counts", torch.zeros(2, num_labels, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, expected: Tensor) -> None:
        """Add texts: whether each label is predicted, and whether it is right, (B, L)."""
        self.counts += torch.stack([(predicted & expected).sum(0), predicted.sum(0) + expected.sum(0)])

    def compute(self) -> Tensor:
        """Return the score."""
        right, all_ = self.counts.sum(1) if self.average == "micro" else self.counts
        f1: Tensor = 2 * right / all_.clamp(min=1)
        return f1.mean()
