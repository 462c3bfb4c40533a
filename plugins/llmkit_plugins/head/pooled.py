"""What heads share that read one vector of a text: the text's encoding, its batches, and the pooled states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Network, Tokenizer, Topology
from llmkit.sequence import Sequence, first_rows, padded, segments_of


class Pooled(Head):
    """A linear layer over one vector of a text: the mean of an encoder's states, or a decoder's last state.

    Args:
        dropout: dropout before the linear layer.
        topology: ``encoder`` reads the text in both directions. ``decoder`` reads it from left to right, so that
            ``model.init_from`` can take all weights of a language model, and variants that are only causal can be used
            (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training").
    """

    topology: Topology = "encoder"  # type: ignore[misc]  # of the instance: it is an argument
    scored_share = 0.0
    inputs = ("text",)
    texts = ("text",)

    def __init__(self, dropout: float = 0.1, topology: Literal["encoder", "decoder"] = "encoder") -> None:
        super().__init__()
        self.topology = topology
        self.dropout = nn.Dropout(dropout)

    def _build(self, dim: int, outputs: int) -> None:
        """Create the linear layer from the pooled state to the outputs."""
        self.classifier = nn.Linear(dim, outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def _encode(self, texts: list[str], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length`` and ``truncated``."""
        ids = [row or [tokenizer.unk_id] for row in tokenizer.encode_batch(texts)]
        return {
            "ids": [row[:max_length] for row in ids],
            "length": [min(len(row), max_length) for row in ids],
            "truncated": [int(len(row) > max_length) for row in ids],
        }

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), and segments (B, T) where padded."""
        batch: Batch = {"ids": padded([feature["ids"] for feature in features], tokenizer.pad_id)}
        segments = segments_of([len(feature["ids"]) for feature in features])
        if segments is not None:
            batch["segments"] = segments
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        """Return the outputs of the linear layer, (B, outputs)."""
        ids, segments = batch["ids"], batch.get("segments")
        seq = Sequence.of(ids, segments)
        x_BTD = net.encode(ids, seq).x_BSD if self.topology == "encoder" else net.decode(ids, seq)
        pooled_BD = self._last(x_BTD, segments) if self.topology == "decoder" else self._mean(x_BTD, segments)
        scores: Tensor = self.classifier(self.dropout(pooled_BD))
        return scores

    @staticmethod
    def _mean(x_BTD: Tensor, segments: Tensor | None) -> Tensor:
        if segments is None:
            return x_BTD.mean(1)
        exact = torch.promote_types(x_BTD.dtype, torch.float32)  # a sum over a long text does not fit into fp16
        real_BT1 = (segments > 0).to(exact)[..., None]
        return ((x_BTD * real_BT1).sum(1) / real_BT1.sum(1)).to(x_BTD.dtype)

    @staticmethod
    def _last(x_BTD: Tensor, segments: Tensor | None) -> Tensor:
        if segments is None:
            return x_BTD[:, -1]
        last_B11 = (segments.sum(1) - 1)[:, None, None]  # texts are padded at the right
        return x_BTD.gather(1, last_B11.expand(-1, 1, x_BTD.shape[-1]))[:, 0]

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return the answers to three texts."""
        rows = first_rows(batch, 3)
        answers = self.predict(net, rows, tokenizer, self.decoding)
        texts = tokenizer.decode_batch(rows["ids"].tolist())
        return "\n".join(f"{self.show(answer)}\t{text[:100]}" for answer, text in zip(answers, texts, strict=True))
