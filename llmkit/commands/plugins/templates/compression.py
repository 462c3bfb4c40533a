"""A compression method: every matrix in another form."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit import register
from llmkit.compression import Packed, PackingMethod


class Signs(Packed):
    """A matrix of which only signs are kept, and a mean magnitude for each row."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns))
        self.positive: Tensor
        self.scale: Tensor
        self.register_buffer("positive", weight.new_empty(rows, columns, dtype=torch.bool))
        self.register_buffer("scale", weight.new_empty(rows, 1))

    def take(self, weight: Tensor) -> None:
        """Keep what there is room for of a matrix."""
        self.positive.copy_(weight > 0)
        self.scale.copy_(weight.abs().mean(1, keepdim=True))

    def forward(self) -> Tensor:
        """Return the matrix."""
        return torch.where(self.positive, self.scale, -self.scale)


@register("compression", "template")
class Template(PackingMethod):
    """The sign of every weight, with the mean magnitude of its row (Rastegari et al. 2016, arXiv:1603.05279)."""

    def form(self, weight: Tensor) -> Packed:
        """Return the empty form of a matrix."""
        return Signs(weight)
