"""Normalisation over the model width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Norm
from llmkit.ops.elementwise import rms_norm


class LayerNorm(Norm):
    """Mean zero and variance one over the width, then a learned scale and shift.

    Ba et al. 2016, arXiv:1607.06450.

    Args:
        dim: model width.
        eps: added to the variance.
        bias: whether there is a learned shift.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised values, in the input's shape."""
        return F.layer_norm(x_BTD, (self.dim,), self.weight, self.bias, self.eps)


class RMSNorm(Norm):
    """Root mean square one over the width, then a learned scale; cheaper than layer normalisation on a GPU.

    Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        dim: model width.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised values, in the input's shape."""
        return rms_norm(x_BTD, self.weight, self.eps)
