"""A position encoding: a penalty on the scores for distance. Override one of the methods of ``Position``."""

from __future__ import annotations

from torch import Tensor

from llmkit import register
from llmkit.contracts import Position


@register("position", "template")
class Template(Position):
    """A penalty on the scores that grows with the logarithm of the distance, alike for all heads; any length.

    This is one of three ways: ``add`` adds vectors to the embeddings, ``rotate`` turns queries and keys. Use the
    positions that are given: with packed documents and in decoding they are not the column numbers.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
        strength: what the logarithm is multiplied with.
    """

    def __init__(self, dim: int, max_length: int, strength: float = 1.0) -> None:
        super().__init__(dim, max_length)
        self.strength = strength

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return minus strength * log(1 + distance), for T queries and S keys: (B or 1, H, T, S)."""
        distance_BTS = (query_BT[:, :, None] - key_BS[:, None, :]).abs()
        penalty_BTS = self.strength * distance_BTS.float().log1p()
        return -penalty_BTS[:, None].expand(-1, num_heads, -1, -1)
