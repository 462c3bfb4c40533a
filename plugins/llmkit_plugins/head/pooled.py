"""What heads share that read one vector of a text or a pair: its encoding, its batches, and the pooled states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Network, Tokenizer, Topology
from llmkit.errors import UserError
from llmkit.ops.framing import framed
from llmkit.sequence import Sequence, first_rows, padded, segments_of

Pool = Literal["mean", "first", "pooler"]


class Pooled(Head):
    """A linear layer over one vector of a text: pooled states of an encoder, or a decoder's last state.

    Args:
        dropout: dropout before the linear layer.
        topology: ``encoder`` reads the text in both directions. ``decoder`` reads it from left to right, so that
            ``model.init_from`` can take all weights of a language model, and variants that are only causal can be used
            (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training").
        pool: which vector of an encoder's states: their ``mean``, the ``first`` (that of ``[CLS]``), or the first
            through a linear layer and tanh, the ``pooler`` of BERT (Devlin et al. 2018, arXiv:1810.04805).
        pair: whether a row has a second text, in the field ``text_pair``.
    """

    topology: Topology = "encoder"  # type: ignore[misc]  # of the instance: it is an argument
    scored_share = 0.0
    inputs = ("text",)
    texts = ("text",)

    def __init__(
        self,
        dropout: float = 0.1,
        topology: Literal["encoder", "decoder"] = "encoder",
        pool: Pool = "mean",
        pair: bool = False,
    ) -> None:
        super().__init__()
        if topology == "decoder" and pool != "mean":
            raise UserError(f"pool: {pool} is for an encoder; of a decoder the last state is read")
        self.topology, self.pool = topology, pool
        if pair:
            self.inputs = self.texts = ("text", "text_pair")  # type: ignore[misc,assignment]  # an argument too
        self.dropout = nn.Dropout(dropout)

    def _build(self, dim: int, outputs: int) -> None:
        """Create the linear layer from the pooled state to the outputs, and the pooler."""
        if self.pool == "pooler":
            self.pooler = nn.Linear(dim, dim)
            nn.init.normal_(self.pooler.weight, std=0.02)
            nn.init.zeros_(self.pooler.bias)
        self.classifier = nn.Linear(dim, outputs)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def _encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Return ``ids`` (cut to the context), ``length`` and ``truncated``, and of pairs the ``types`` of the ids."""
        pair = len(self.inputs) == 2
        first = [row or [tokenizer.unk_id] for row in tokenizer.encode_batch(rows["text"])]
        second = tokenizer.encode_batch(rows["text_pair"]) if pair else [None] * len(first)
        found = [framed(tokenizer, *texts, max_length) for texts in zip(first, second, strict=True)]
        features: dict[str, list[Any]] = {
            "ids": [row.ids for row in found],
            "length": [len(row.ids) for row in found],
            "truncated": [int(row.cut) for row in found],
        }
        return {**features, "types": [row.types for row in found]} if pair else features

    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Return ids (B, T), segments (B, T) where padded, and of pairs types (B, T)."""
        batch: Batch = {"ids": padded([feature["ids"] for feature in features], tokenizer.pad_id)}
        if "types" in features[0]:
            batch["types"] = padded([feature["types"] for feature in features], 0)
        segments = segments_of([len(feature["ids"]) for feature in features])
        if segments is not None:
            batch["segments"] = segments
        return batch

    def scores(self, net: Network, batch: Batch) -> Tensor:
        """Return the outputs of the linear layer, (B, outputs)."""
        scores: Tensor = self.classifier(self.dropout(self._pooled(net, batch)))
        return scores

    def _pooled(self, net: Network, batch: Batch) -> Tensor:
        """Return the vector that is read of each text, (B, D)."""
        ids, segments = batch["ids"], batch.get("segments")
        seq = Sequence.of(ids, segments, batch.get("types"))
        if self.topology == "decoder":
            pooled_BD = self._last(net.decode(ids, seq), segments)
        else:
            x_BTD = net.encode(ids, seq).x_BSD
            pooled_BD = self._mean(x_BTD, segments) if self.pool == "mean" else x_BTD[:, 0]
        if self.pool == "pooler":
            pooled_BD = torch.tanh(self.pooler(pooled_BD))
        return pooled_BD

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
