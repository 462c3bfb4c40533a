"""A norm: keeps the values that layers read and write at a steady scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Norm


@register("norm", "template")
class Template(Norm):
    """Scale each position to root mean square one, then multiply by a learned weight.

    Args:
        dim: model width.
        eps: added to the mean square, so that a zero input stays zero instead of becoming NaN.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised values, (B, T, D), each position on its own."""
        exact_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))  # bfloat16 is too coarse for squares
        scale_BT1 = torch.rsqrt(exact_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (exact_BTD * scale_BT1).to(x_BTD.dtype) * self.weight.to(x_BTD.dtype)
