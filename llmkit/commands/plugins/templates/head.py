"""A head: a task, from rows of data to answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from llmkit import register
from llmkit.contracts import Batch, Head, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError, unknown
from llmkit.ops.metrics import MeanLoss
from llmkit.sequence import DecodingOptions, Sequence, padded, segments_of


@register("head", "template")
class Template(Head):
    """Assign one of several labels to each text: the mean of the encoder's states, then a linear layer.

    Shapes: B batch, T positions, D model width, L labels.
    """

    topology = "encoder"  # each position sees the whole text; `decoder`: only the positions before it
    inputs = ("text",)  # the columns that prediction reads
    targets = ("label",)  # the further columns that training reads
    classes = ("label",)  # the targets that hold a class: none is only in rows set aside for validation
    texts = ("text",)  # the text columns, on which a tokenizer is trained
    monitor = ("accuracy", "max")  # the metric that chooses the best checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Collect the labels of the training rows; called once, before training."""
        self.labels = sorted({str(label) for label in columns["label"]})
        if len(self.labels) < 2:
            raise UserError(f"the column 'label' needs at least two labels, the training data has {self.labels}")

    def info(self) -> dict[str, Any]:
        """Return what ``learn`` collected, for the checkpoint."""
        return {"labels": self.labels}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore it from a checkpoint."""
        self.labels = list(info["labels"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from the mean state, (B, D), to the scores, (B, L)."""
        self.linear = nn.Linear(dim, len(self.labels))

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Turn rows into features: ints, lists of ints, or strings. There is no ``label`` when predicting."""
        ids = [row or [tokenizer.unk_id] for row in tokenizer.encode_batch(rows["text"])]
        features: dict[str, list[Any]] = {
            "ids": [row[:max_length] for row in ids],
            "length": [min(len(row), max_length) for row in ids],
            "truncated": [int(len(row) > max_length) for row in ids],
        }
        if "label" in rows:
            numbers = {label: number for number, label in enumerate(self.labels)}
            for label in map(str, rows["label"]):
                if label not in numbers:
                    raise UserError(unknown("label", label, self.labels) + " It was not seen in training.")
            features["label"] = [numbers[str(label)] for label in rows["label"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Turn features into tensors: ids (B, T), segments (B, T) where there is padding, label (B,)."""
        batch = {"ids": padded([feature["ids"] for feature in features], tokenizer.pad_id)}
        segments_BT = segments_of([len(feature["ids"]) for feature in features])
        if segments_BT is not None:
            batch["segments"] = segments_BT
        if "label" in features[0]:
            batch["label"] = torch.tensor([feature["label"] for feature in features])
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        """Return the scores of the labels, (B, L)."""
        ids_BT, segments_BT = batch["ids"], batch.get("segments")
        x_BTD = net.encode(ids_BT, Sequence.of(ids_BT, segments_BT)).x_BSD
        real_BT1 = torch.ones_like(ids_BT)[..., None] if segments_BT is None else segments_BT[..., None]
        scores_BL: Tensor = self.linear((x_BTD * real_BT1).sum(1) / real_BT1.sum(1))
        return scores_BL

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the cross-entropy as a sum and the number of rows."""
        label_B, scores_BL = batch["label"], self.scores(net, batch)
        exact_BL = scores_BL.to(torch.promote_types(scores_BL.dtype, torch.float32))  # bfloat16 would round the sum
        total = F.cross_entropy(exact_BL, label_B, reduction="sum")
        return Loss(total, torch.tensor(len(label_B), device=label_B.device))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return fresh metrics by name."""
        return {"loss": MeanLoss(), "accuracy": MulticlassAccuracy(len(self.labels), average="micro")}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        metrics["loss"].update(self.loss(net, batch))
        metrics["accuracy"].update(self.scores(net, batch), batch["label"])

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return the ``label`` of each row and its ``probability``."""
        probability_B, number_B = self.scores(net, batch).float().softmax(-1).max(-1)
        pairs = zip(number_B.tolist(), probability_B.tolist(), strict=True)
        return [{"label": self.labels[number], "probability": probability} for number, probability in pairs]
