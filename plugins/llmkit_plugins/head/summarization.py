"""Summarization with an encoder-decoder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from llmkit.ops.metrics import Mean, listed
from llmkit.sequence import DecodingOptions
from llmkit_plugins.head.sequence_to_sequence import SequenceToSequence


class Summarization(SequenceToSequence):
    """Summarization: reads a document, writes a summary (encoder-decoder, label smoothing, beam search).

    Rush et al. 2015, arXiv:1509.00685; the network is that of Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        label_smoothing: share of the probability spread evenly over the vocabulary while training.
        references: ``lines``: each line of a summary is a reference of its own, the first of which is trained on.
        start: the tokens that the decoder reads before a summary, of ``bos``, ``eos`` and ``pad``; None: bos.
    """

    inputs = ("document",)
    targets = ("summary",)
    texts = ("document", "summary")
    decoding = DecodingOptions(temperature=0.0, num_beams=5)

    def text_metrics(self) -> dict[str, nn.Module]:
        """Return ROUGE-1, ROUGE-2 and ROUGE-L."""
        return {"rouge1": ROUGE("1"), "rouge2": ROUGE("2"), "rougeL": ROUGE("L")}


_ONE_BY_ONE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_ROUGE_TOKEN = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")


class ROUGE(Mean):
    """Mean F-measure of ROUGE over all texts, each against the best of its references, 0 to 100.

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

    def update(self, predictions: list[str], references: Sequence[str | list[str]]) -> None:
        """Add texts, and the reference or references of each."""
        for text, several in zip(predictions, references, strict=True):
            self.total += max(self._f_measure(text, reference) for reference in listed(several))
            self.count += 1

    def _f_measure(self, *pair: str) -> float:
        a, b = (_ROUGE_TOKEN.findall(text.lower()) for text in pair)
        if self.kind == "L":
            common, units = _common_subsequence(a, b), len(a) + len(b)
        else:  # zip pairs each token with the next one: a b c becomes (a, b), (b, c)
            size = range(int(self.kind))
            grams, others = (Counter(zip(*(row[i:] for i in size), strict=False)) for row in (a, b))
            common, units = (grams & others).total(), grams.total() + others.total()
        return 2 * common / max(1, units)  # 2PR / (P + R): twice the common units over the units of both

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
