"""Metrics weighted by token or example, never by batch, and equal over any number of processes."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from typing import Any, Literal

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
    """Loss in bits for each UTF-8 byte of the text, comparable between tokenizers."""

    higher_is_better = False

    def update(self, loss: Loss, num_bytes: Tensor) -> None:
        """Add a summed loss and the number of bytes it covers."""
        self.total += loss.total.detach() / math.log(2)
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


_ONE_BY_ONE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_ROUGE_TOKEN = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")


class ROUGE(Mean):
    """Mean F-measure of ROUGE over all texts, each against one reference, 0 to 100.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    Tokens are runs of letters and digits in lower case, not stemmed, and single characters in Chinese and Japanese.
    On plain ASCII text this equals the ``rouge_score`` package without its stemmer.

    Args:
        kind: ``1`` or ``2``: tokens or pairs of tokens are counted; ``L``: the longest common subsequence.
    """

    higher_is_better = True

    def __init__(self, kind: Literal["1", "2", "L"]) -> None:
        super().__init__()
        self.kind = kind

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add texts and their references."""
        for pair in zip(predictions, references, strict=True):
            a, b = (_ROUGE_TOKEN.findall(text.lower()) for text in pair)
            if self.kind == "L":
                common, units = _common_subsequence(a, b), len(a) + len(b)
            else:  # zip pairs each token with the next one: a b c becomes (a, b), (b, c)
                size = range(int(self.kind))
                grams, others = (Counter(zip(*(row[i:] for i in size), strict=False)) for row in (a, b))
                common, units = (grams & others).total(), grams.total() + others.total()
            self.total += 2 * common / max(1, units)  # 2PR / (P + R): twice the common units over the units of both
            self.count += 1

    def compute(self) -> Tensor:
        """Return the mean F-measure, 0 to 100."""
        return 100 * self.total / self.count


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(b) + 1)  # with the part of ``a`` seen so far, for each beginning of ``b``
    for token in a:
        diagonal = 0
        for i, other in enumerate(b, 1):
            diagonal, best[i] = best[i], diagonal + 1 if token == other else max(best[i], best[i - 1])
    return best[-1]


_SAME_PREFIX = {"M": "I", "L": "E", "U": "S"}  # BMES and BILOU, as BIOES writes them


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the entities of a sentence as (label, first word, word after the last one).

    Tags are ``O`` or a prefix and a label, ``B-PER``; schemes BIO, BIOES, BMES, BILOU. As conlleval counts, and seqeval
    by default, an ``I-`` that continues no entity of its label begins one (Tjong Kim Sang and De Meulder 2003,
    "Introduction to the CoNLL-2003 Shared Task").
    """
    found: list[tuple[str, int, int]] = []
    before, label, begin = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, new = tag.partition("-")
        prefix = _SAME_PREFIX.get(prefix, prefix)
        if not (before in ("B", "I") and prefix in ("I", "E") and new == label):
            if before != "O":
                found.append((label, begin, place))
            begin = place
        before, label = prefix, new
    return found


class EntityScore(Metric):
    """Precision, recall or F1 of entities, 0 to 1; an entity is right if its label, first and last word are.

    Computed over all entities together (micro average), as conlleval and seqeval do.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, kind: Literal["precision", "recall", "f1"]) -> None:
        super().__init__()
        self.kind = kind
        self.add_state("counts", torch.zeros(3, dtype=EXACT), dist_reduce_fx="sum")

    def update(self, predicted: list[list[str]], expected: list[list[str]]) -> None:
        """Add the tags of sentences."""
        pairs = [(set(entities(a)), set(entities(b))) for a, b in zip(predicted, expected, strict=True)]
        rows = [[0, 0, 0], *([len(a & b), len(a), len(b)] for a, b in pairs)]
        self.counts += self.counts.new_tensor(rows).sum(0)

    def compute(self) -> Tensor:
        """Return the score; 0 where no entity was predicted or none is in the references."""
        right, predicted, expected = self.counts
        of = {"precision": predicted, "recall": expected, "f1": (predicted + expected) / 2}[self.kind]
        score: Tensor = right / of.clamp(min=0.5)  # the least number of entities that is not zero
        return score


def answer_scores(answer: str, references: list[str], by_character: bool = False) -> tuple[float, float]:
    """Return exact match and F1 of an answer, 0 to 1, each against the reference where it is best.

    By word it is what SQuAD's official script computes (Rajpurkar et al. 2016, arXiv:1606.05250): F1 of the common
    words, in lower case, without ASCII punctuation and the articles a, an and the. By character, for scripts without
    spaces between words, it is the same for single characters, without punctuation and white space.
    Without references both are 0.
    """
    words = _answer_words(answer, by_character)
    exact = best = 0.0
    for reference in references:
        expected = _answer_words(reference, by_character)
        exact = max(exact, float(words == expected))
        common = (Counter(words) & Counter(expected)).total()
        best = max(best, 2 * common / max(1, len(words) + len(expected)))
    return exact, best


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _answer_words(text: str, by_character: bool) -> list[str]:
    if by_character:
        return [c for c in text.lower() if not (c.isspace() or unicodedata.category(c).startswith("P"))]
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ASCII_PUNCTUATION)).split()
