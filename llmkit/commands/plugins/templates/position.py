"""A position encoding: lowers attention scores with distance. Override one of the methods of ``Position``."""

from __future__ import annotations

from torch import Tensor

from llmkit import register
from llmkit.contracts import Position


@register("position", "template")
class Template(Position):
    """A penalty on the scores that grows with the logarithm of the distance, equal for all heads; any length.

    ``bias`` is one of three ways: ``add`` adds vectors to the embeddings, ``rotate`` rotates queries and keys. Use the
    positions passed in: with packed documents and in decoding they differ from the column numbers.

    Args:
        dim: model width.
        max_length: the context; this encoding has no limit.
        strength: factor of the logarithm.
    """

    def __init__(self, dim: int, max_length: int, strength: float = 1.0) -> None:
        super().__init__(dim, max_length)
        self.strength = strength

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return minus strength * log(1 + distance), for T queries and S keys: (B or 1, H, T, S)."""
        distance_BTS = (query_BT[:, :, None] - key_BS[:, None, :]).abs()
        penalty_BTS = self.strength * distance_BTS.float().log1p()
        return -penalty_BTS[:, None].expand(-1, num_heads, -1, -1)
