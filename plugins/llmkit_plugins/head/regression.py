"""Predicting a number for a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llmkit.contracts import Batch, Loss, Network, Stage, Tokenizer
from llmkit.errors import UserError
from llmkit.ops.metrics import EXACT, MeanLoss
from llmkit.sequence import DecodingOptions, moved
from llmkit_plugins.head.labels import accepted
from llmkit_plugins.head.pooled import Pool, Pooled

BITS = torch.int64 if torch.float64 == EXACT else torch.int32
"""Integers of the size of an exact number."""


def _number(value: Any) -> float:
    """Return a score as a number. Raises UserError for any other value."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"the score is {value!r:.60}, expected a finite number")
    return number


class Regression(Pooled):
    """Predicts a ``score`` of a text: a linear layer over the mean of the encoder's states.

    It is trained on the squared error of scores that are standardised by the mean and the standard deviation of the
    training rows. That is also the metric ``loss``; ``mse`` is in the unit of the scores.

    Args:
        dropout: dropout before the linear layer.
        topology: ``encoder``, or ``decoder``: a causal network, whose state at the last token is used. It takes all
            weights of a language model (``model.init_from``) and any causal variant.
        pool: which vector of an encoder's states is read: their ``mean``, the ``first`` (that of ``[CLS]``), or the
            first through BERT's ``pooler``, a linear layer and tanh.
        pair: whether a row has a second text, in the field ``text_pair``.
    """

    targets = ("score",)
    monitor = ("mse", "min")

    def __init__(
        self,
        dropout: float = 0.1,
        topology: Literal["encoder", "decoder"] = "encoder",
        pool: Pool = "mean",
        pair: bool = False,
    ) -> None:
        super().__init__(dropout, topology, pool, pair)
        self.mean, self.deviation = 0.0, 1.0

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Take mean and standard deviation of the training rows' scores."""
        count, mean, squares = 0, 0.0, 0.0
        for _, score in accepted(columns["score"], _number):
            count += 1
            difference = score - mean  # Welford's sums, which do not cancel
            mean += difference / count
            squares += difference * (score - mean)
        self.mean, self.deviation = mean, math.sqrt(squares / max(1, count))
        if not (self.deviation > 0 and math.isfinite(self.deviation)):
            raise UserError(f"regression needs different scores; those of the training data are all {mean:g}")

    def info(self) -> dict[str, Any]:
        """Return mean and standard deviation of the scores."""
        return {"mean": self.mean, "deviation": self.deviation}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what ``info`` returned. Raises ValueError when they are not numbers."""
        self.mean, self.deviation = float(info["mean"]), float(info["deviation"])

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the linear layer from the pooled state to the score."""
        self._build(dim, 1)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length``, ``truncated`` and, when it is known, ``score`` as text."""
        features = self._encode(rows, tokenizer, max_length)
        if "score" in rows:
            features["score"] = [repr(_number(score)) for score in rows["score"]]
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), segments (B, T) where padded, and the scores as texts.

        As texts because half precision would round a tensor of numbers.
        """
        batch = super().collate(features, tokenizer)
        if "score" in features[0]:
            batch["score"] = [feature["score"] for feature in features]
        return batch

    def _standardised(self, scores: list[str], like: Tensor) -> Tensor:
        """Return the scores of a batch in standard deviations from the mean, (B,)."""
        values = [(float(score) - self.mean) / self.deviation for score in scores]
        return moved(torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32)), like.device)

    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the summed squared error of the standardised scores."""
        return self._loss(self.scores(net, batch)[:, 0], batch["score"])

    def _loss(self, predicted: Tensor, scores: list[str]) -> Loss:
        expected = self._standardised(scores, predicted)
        total = (predicted.to(expected.dtype) - expected).square().sum()
        return Loss(total, torch.full((), len(scores), device=predicted.device))

    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return loss, mean squared error in the unit of the scores, and the correlations."""
        names: tuple[Literal["mse", "pearson", "spearman"], ...] = ("mse", "pearson", "spearman")
        return {"loss": MeanLoss(), **{name: ScoreMetric(name) for name in names}}

    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""
        predicted = self.scores(net, batch)[:, 0]
        metrics["loss"].update(self._loss(predicted, batch["score"]))
        expected = torch.tensor([float(score) for score in batch["score"]], dtype=EXACT, device=predicted.device)
        for name in ("mse", "pearson", "spearman"):
            metrics[name].update(self._unit(predicted), expected)

    def _unit(self, predicted: Tensor) -> Tensor:
        """Return standardised scores in the unit of the data."""
        return self.mean + self.deviation * predicted.to(EXACT)

    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return the ``score`` of each row."""
        return [{"score": score} for score in self._unit(self.scores(net, batch)[:, 0]).tolist()]

    def show(self, answer: dict[str, Any]) -> str:
        """Return the score."""
        return f"{answer['score']:.4f}"


class ScoreMetric(Metric):
    """Mean squared error, Pearson's or Spearman's correlation of predicted and expected scores.

    Spearman's is Pearson's of the ranks, where equal scores share the mean of theirs. Correlations with a constant are
    NaN. All scores are kept, as integers of the same bits: half precision would round the numbers.
    """

    full_state_update = False
    pairs: list[Tensor]

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether it is a correlation."""
        return self.kind != "mse"

    def __init__(self, kind: Literal["mse", "pearson", "spearman"]) -> None:
        super().__init__()
        self.kind = kind
        self.add_state("pairs", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all scores."""
        super().reset()
        # A process without rows takes part in the exchange too: it would leave out a list that is empty.
        self.pairs = [torch.zeros(0, 2, dtype=BITS, device=self.device)]

    def update(self, predicted: Tensor, expected: Tensor) -> None:
        """Add scores, (B,) each."""
        pairs = torch.stack([predicted.detach().to(EXACT), expected.to(EXACT)], 1)
        self.pairs.append(pairs.view(BITS))

    def compute(self) -> Tensor:
        """Return the value."""
        predicted, expected = dim_zero_cat(self.pairs).view(EXACT).unbind(1)
        if self.kind == "mse":
            return (predicted - expected).square().mean()
        if self.kind == "spearman":
            predicted, expected = _ranks(predicted), _ranks(expected)
        a, b = predicted - predicted.mean(), expected - expected.mean()
        correlation: Tensor = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
        return correlation


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, from 1; equal values share the mean of theirs: 3, 5, 5 have 1, 2.5, 2.5."""
    _, numbers, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = (last - (counts - 1) / 2)[numbers]
    return ranks.to(values.dtype)
