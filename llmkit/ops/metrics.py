"""Metrics weighted by token or example, never by batch, and equal over any number of processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.contracts import Loss

EXACT = torch.float32 if torch.backends.mps.is_available() else torch.float64
"""Dtype of accumulated sums; Apple's GPUs have no doubles."""


class Metrics(nn.ModuleDict):
    """Metrics by name. Their states move with the model, but no cast makes them narrower.

    A model in half precision (``trainer.precision: bf16-true``) casts everything in it, and a bfloat16 cannot count
    beyond 256. That goes for the metrics of any head, torchmetrics' own among them.

    Args:
        make: builds the metrics.
    """

    def __init__(self, make: Callable[[], dict[str, nn.Module]]) -> None:
        with _single_or_wider():
            super().__init__(make())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(state: Tensor) -> Tensor:
            moved, dtype = fn(state), state.dtype
            if dtype.is_floating_point and torch.promote_types(dtype, moved.dtype) != moved.dtype:
                return state.to(moved.device)
            return moved

        with _single_or_wider():
            module: Self = super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
            return module


@contextlib.contextmanager
def _single_or_wider() -> Iterator[None]:
    """Make at least float32 the default dtype: it is half while Lightning builds such a model, and metrics take it."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(default, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def computed(name: str, metric: Metric) -> dict[str, Tensor]:
    """Return the value of a metric by its name.

    A metric with ``labels``, one for each of the numbers that it computes, gives each a name of its own,
    ``accuracy_256``; those that are NaN are left out.
    """
    value: Tensor = metric.compute()
    labels = getattr(metric, "labels", None)
    if labels is None:
        return {name: value}
    found = zip(labels, value, strict=True)
    return {f"{name}_{label}": number for label, number in found if not number.isnan()}


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


class MeanScore(Mean):
    """Mean of values of which larger ones are better, such as 1 for a right answer and 0 for a wrong one."""

    higher_is_better = True


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

    def update(self, loss: Loss, num_bytes: Tensor | float, hidden_bytes: float = 0.0) -> None:
        """Add a summed loss, the number of bytes it covers, and how many of them unknown tokens stand for."""
        self.total += loss.total.detach().to(EXACT) / math.log(2) + 8 * hidden_bytes
        self.count += num_bytes.sum() if isinstance(num_bytes, Tensor) else num_bytes


def listed(reference: str | list[str]) -> list[str]:
    """Return the references of a text, one or several."""
    return [reference] if isinstance(reference, str) else reference


class _CorpusScore(Metric):
    """A sacrebleu corpus score from summed sufficient statistics, so that processes add up exactly."""

    full_state_update = False
    higher_is_better = True
    statistics: Tensor

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.scorer = scorer
        self._counts: set[int] = set()  # the numbers of references that were seen
        # The statistics are counts; one example shows how many there are.
        width = len(scorer._extract_corpus_statistics(["a"], [["a"]])[0])
        self.add_state("statistics", torch.zeros(width, dtype=EXACT), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: Sequence[str | list[str]]) -> None:
        """Add sentences, and the reference or references of each, detokenised."""
        several = [listed(reference) for reference in references]
        self._counts.update(map(len, several))
        # sacrebleu takes all first references, all second ones, ...; None where a sentence has fewer.
        rows = self.scorer._extract_corpus_statistics(predictions, list(zip_longest(*several)))
        self.statistics += torch.tensor(rows, dtype=EXACT, device=self.statistics.device).sum(0)

    def compute(self) -> Tensor:
        """Return the corpus score, 0 to 100."""
        score = self.scorer._compute_score_from_stats([int(value) for value in self.statistics.tolist()]).score
        return torch.tensor(score, dtype=EXACT)

    def signature(self) -> str:
        """Return sacrebleu's signature of how the score is computed (Post 2018, arXiv:1804.08771)."""
        self.scorer.num_refs = min(self._counts, default=1) if len(self._counts) < 2 else -1
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
