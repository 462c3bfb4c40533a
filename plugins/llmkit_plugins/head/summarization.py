"""Summarization with an encoder-decoder."""

from __future__ import annotations

from torch import nn

from llmkit.ops.metrics import ROUGE
from llmkit.sequence import DecodingOptions
from llmkit_plugins.head.sequence_to_sequence import SequenceToSequence


class Summarization(SequenceToSequence):
    """Summarization: reads a document, writes a summary (encoder-decoder, label smoothing, beam search).

    Rush et al. 2015, arXiv:1509.00685; the network is that of Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        label_smoothing: share of the probability spread evenly over the vocabulary while training.
    """

    inputs = ("document",)
    targets = ("summary",)
    texts = ("document", "summary")
    decoding = DecodingOptions(temperature=0.0, num_beams=5)

    def text_metrics(self) -> dict[str, nn.Module]:
        """Return ROUGE-1, ROUGE-2 and ROUGE-L."""
        return {"rouge1": ROUGE("1"), "rouge2": ROUGE("2"), "rougeL": ROUGE("L")}
