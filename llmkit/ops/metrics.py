"""Metrics weighted by token or example, never by batch, and equal over any number of processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from llmkit.contracts import Loss

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.float64
"""Dtype of accumulated sums; Apple's GPUs have no doubles."""


class Mean(Metric):
    """Mean of values that come as a sum and their number, both added up over batches and processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=EXACT), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=EXACT), dist_reduce_fx="sum")

    def update(self, total: Any, count: Any) -> None:
        """Add ``count`` values whose sum is ``total``; numbers, or tensors with a single one."""
        self.total += total.detach() if isinstance(total, Tensor) else total
        self.count += count

    def compute(self) -> Tensor:
        """Return total / count."""
        return self.total / self.count


class MeanLoss(Mean):
    """Mean loss in nats per token or example."""

    higher_is_better = False

    def update(self, loss: Loss) -> None:  # type: ignore[override]
        """Add a summed loss."""
        self.total += loss.total.detach()
        self.count += loss.count


class Perplexity(MeanLoss):
    """exp of the mean loss per token."""

    def compute(self) -> Tensor:
        """Return exp(total / count)."""
        return super().compute().exp()


class BitsPerByte(Mean):
    """Loss in bits for each UTF-8 byte of the text, comparable between tokenizers.

    The loss of an unknown token is that of naming it unknown. To that come 8 bits for each byte of text it stands for:
    the bytes of unknown words are taken to be uniformly distributed.
    """

    higher_is_better = False

    def update(self, loss: Loss, num_bytes: Tensor, hidden_bytes: Tensor | float = 0.0) -> None:
        """Add a summed loss, the number of bytes it covers, and how many of them unknown tokens stand for."""
        self.total += loss.total.detach() / math.log(2) + 8 * hidden_bytes
        self.count += num_bytes.sum()


class _CorpusScore(Metric):
    """A sacrebleu corpus score from summed sufficient statistics, so that processes add up exactly."""

    full_state_update = False
    statistics: Tensor

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.scorer = scorer
        # The statistics are counts; one example shows how many there are.
        width = len(scorer._extract_corpus_statistics(["a"], [["a"]])[0])
        self.add_state("statistics", torch.zeros(width, dtype=EXACT), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add sentences and their references, detokenised."""
        rows = self.scorer._extract_corpus_statistics(predictions, [references])
        self.statistics += torch.tensor(rows, dtype=EXACT, device=self.statistics.device).sum(0)

    def compute(self) -> Tensor:
        """Return the corpus score, 0 to 100."""
        score = self.scorer._compute_score_from_stats([int(value) for value in self.statistics.tolist()]).score
        return torch.tensor(score, dtype=EXACT)

    def signature(self) -> str:
        """Return sacrebleu's signature of how the score is computed (Post 2018, arXiv:1804.08771)."""
        self.scorer.num_refs = 1
        return str(self.scorer.get_signature())


class BLEU(_CorpusScore):
    """BLEU as sacrebleu computes it (Papineni et al. 2002; Post 2018, arXiv:1804.08771)."""

    def __init__(self, tokenize: str = "13a") -> None:
        from sacrebleu.metrics import bleu

        super().__init__(bleu.BLEU(tokenize=tokenize))


class ChrF(_CorpusScore):
    """chrF as sacrebleu computes it (Popovic 2015)."""

    def __init__(self) -> None:
        from sacrebleu.metrics import chrf

        super().__init__(chrf.CHRF())
