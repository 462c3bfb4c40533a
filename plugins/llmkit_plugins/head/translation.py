"""Translation with an encoder-decoder."""

from __future__ import annotations

from typing import Literal

from torch import nn

from llmkit.ops.metrics import BLEU, ChrF
from llmkit.sequence import DecodingOptions
from llmkit_plugins.head.sequence_to_sequence import SequenceToSequence


class Translation(SequenceToSequence):
    """Translation: reads a source text, writes a target text (encoder-decoder, label smoothing, beam search).

    Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        label_smoothing: share of the probability spread evenly over the vocabulary while training.
        bleu_tokenize: how sacrebleu tokenizes for BLEU: 13a (most languages), zh, ja-mecab, char, ...
        references: ``lines``: each line of a target is a reference of its own, the first of which is trained on.
    """

    inputs = ("source",)
    targets = ("target",)
    texts = ("source", "target")
    decoding = DecodingOptions(temperature=0.0, num_beams=5)

    def __init__(
        self, label_smoothing: float = 0.1, bleu_tokenize: str = "13a", references: Literal["one", "lines"] = "one"
    ) -> None:
        super().__init__(label_smoothing, references)
        self.bleu_tokenize = bleu_tokenize

    def text_metrics(self) -> dict[str, nn.Module]:
        """Return BLEU and chrF."""
        return {"bleu": BLEU(self.bleu_tokenize), "chrf": ChrF()}
