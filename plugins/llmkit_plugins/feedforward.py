"""Per-position networks of a layer. The last linear map is ``out``; dropout acts on the hidden values."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Feedforward
from llmkit.ops.elementwise import Dropout
from llmkit.ops.fused import fused


class _TwoLayers(Feedforward):
    """Two linear maps with an activation between them."""

    def __init__(self, dim: int, hidden_multiple: float = 4.0, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dim)
        hidden = round(hidden_multiple * dim)
        self.inner = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.dropout = Dropout(dropout)

    @abstractmethod
    def activate(self, x: Tensor) -> Tensor:
        """Return the hidden values after the activation."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the new values, position by position."""
        y_BTD: Tensor = self.out(self.dropout(self.activate(self.inner(x_BTD))))
        return y_BTD


class ReLU(_TwoLayers):
    """Two linear maps with ReLU between them.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.3.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        return F.relu(x)


class GELU(_TwoLayers):
    """Two linear maps with GELU between them.

    Hendrycks and Gimpel 2016, arXiv:1606.08415; the exact form with the error function, not the tanh approximation.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return x times the normal distribution function of x."""
        return F.gelu(x)


class SquaredReLU(_TwoLayers):
    """Two linear maps with the square of ReLU between them.

    So et al. 2021 (Primer), arXiv:2109.08668.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return max(x, 0) squared."""
        return F.relu(x).square()


class SwiGLU(Feedforward):
    """A linear map gated by the SiLU of another one, then a linear map back.

    Shazeer 2020, arXiv:2002.05202. It has three matrices, so the hidden width is two thirds of ``hidden_multiple *
    dim``, rounded up to a multiple of 8: as many parameters as the others at the same ``hidden_multiple``.

    Args:
        dim: model width.
        hidden_multiple: what the hidden width of a network of the same size with two matrices would be, as a
            multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
    """

    def __init__(self, dim: int, hidden_multiple: float = 4.0, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dim)
        hidden = 8 * math.ceil(hidden_multiple * dim / 12)
        self.inner = fused(nn.Linear(dim, 2 * hidden, bias=bias), [hidden] * 2)
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the new values, position by position."""
        gate, value = self.inner(x_BTD).chunk(2, dim=-1)
        y_BTD: Tensor = self.out(self.dropout(F.silu(gate) * value))
        return y_BTD
