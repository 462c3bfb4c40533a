"""Labelling a text with one of several classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from llmkit.contracts import Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError, unknown
from llmkit.ops.metrics import MeanLoss
from llmkit.sequence import DecodingOptions, Sequence, first_rows, padded, segments_of


class Classification(Head):
    """Text classification with one label a text: mean of the encoder's states, then a linear layer.

    Args:
        dropout: dropout before the linear layer.
        label_smoothing: share of the probability spread evenly over the labels while training.
    """

    topology = "encoder"
    inputs = ("text",)
    targets = ("label",)
    texts = ("text",)
    monitor = ("accuracy", "max")

    def __init__(self, dropout: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.dropout = nn.Dropout(dropout)
        self.labels: list[str] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take the label names from the training rows, sorted."""
        self.labels = sorted({str(label) for label in columns["label"]})
        if len(self.labels) < 2:
            raise UserError(f"classification needs at least two labels; the training data has only {self.labels}")

    def info(self) -> dict[str, Any]:
        """Return the label names."""
        return {"labels": self.labels}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore the label names. Raises TypeError when they are not texts."""
        "".join(info["labels"])
        self.labels = list(info["labels"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from the mean state to the labels."""
        self.classifier = nn.Linear(dim, len(self.labels))
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length``, ``truncated`` and, when it is known, ``label``."""
        ids = [row or [tokenizer.unk_id] for row in tokenizer.encode_batch(rows["text"])]
        features: dict[str, list[Any]] = {
            "ids": [row[:max_length] for row in ids],
            "length": [min(len(row), max_length) for row in ids],
            "truncated": [int(len(row) > max_length) for row in ids],
        }
        if "label" in rows:
            numbers = {label: number for number, label in enumerate(self.labels)}
            for label in rows["label"]:
                if str(label) not in numbers:
                    raise UserError(unknown("label", str(label), self.labels) + " It was not seen in training.")
            features["label"] = [numbers[str(label)] for label in rows["label"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), segments (B, T) where padded, and label (B,)."""
        batch = {"ids": padded([feature["ids"] for feature in features], tokenizer.pad_id)}
        segments = segments_of([len(feature["ids"]) for feature in features])
        if segments is not None:
            batch["segments"] = segments
        if "label" in features[0]:
            batch["label"] = torch.tensor([feature["label"] for feature in features])
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        """Return the label scores, (B, number of labels)."""
        ids, segments = batch["ids"], batch.get("segments")
        x_BTD = net.encode(ids, Sequence.of(ids, segments)).x_BSD
        if segments is None:
            mean_BD = x_BTD.mean(1)
        else:
            exact = torch.promote_types(x_BTD.dtype, torch.float32)  # a sum over a long text does not fit into fp16
            real_BT1 = (segments > 0).to(exact)[..., None]
            mean_BD = ((x_BTD * real_BT1).sum(1) / real_BT1.sum(1)).to(x_BTD.dtype)
        scores: Tensor = self.classifier(self.dropout(mean_BD))
        return scores

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed, smoothed cross-entropy of the labels."""
        return self._loss(self.scores(net, batch), batch["label"], self.label_smoothing)

    def _loss(self, scores: Tensor, label: Tensor, smoothing: float) -> Loss:
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        total = F.cross_entropy(exact, label, reduction="sum", label_smoothing=smoothing)
        return Loss(total, torch.tensor(len(label), device=label.device))

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

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return the labels of three texts."""
        rows = first_rows(batch, 3)
        answers = self.predict(net, rows, tokenizer, self.decoding)
        texts = tokenizer.decode_batch(rows["ids"].tolist())
        return "\n".join(f"{self.show(answer)}\t{text[:100]}" for answer, text in zip(answers, texts, strict=True))

    def show(self, answer: dict[str, Any]) -> str:
        """Return the label and its probability."""
        return f"{answer['label']}\t{answer['probability']:.4f}"
