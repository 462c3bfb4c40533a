"""A norm: it keeps the size of what the layers read and write in bounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Norm


@register("norm", "template")
class Template(Norm):
    """Root mean square one over the width, then a learned weight.

    Args:
        dim: model width.
        eps: added to the mean square, so that zeros stay zeros.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised values, (B, T, D), each position on its own."""
        exact_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))  # squares need more digits than bfloat16
        scale_BT1 = torch.rsqrt(exact_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (exact_BTD * scale_BT1).to(x_BTD.dtype) * self.weight.to(x_BTD.dtype)
