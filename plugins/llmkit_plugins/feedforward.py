"""Per-position networks of a layer. The last linear map is ``out``; dropout acts on the hidden values."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Feedforward
from llmkit.errors import UserError
from llmkit.ops.elementwise import Dropout
from llmkit.ops.fused import fused


class _TwoLayers(Feedforward):
    """Two linear maps with an activation between them.

    With ``gated`` there are three matrices, so ``hidden_multiple`` means two thirds of that width, rounded up to a
    multiple of 8: as many parameters as without.
    """

    def __init__(
        self,
        dim: int,
        hidden_multiple: float = 4.0,
        bias: bool = False,
        dropout: float = 0.0,
        gated: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim)
        if hidden is None:
            hidden = 8 * math.ceil(hidden_multiple * dim / 12) if gated else round(hidden_multiple * dim)
        if hidden < 1:
            raise UserError(f"the hidden width must be at least 1, got {hidden}")
        self.gated = gated
        inner = nn.Linear(dim, 2 * hidden if gated else hidden, bias=bias)
        self.inner = fused(inner, [hidden] * 2) if gated else inner
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.dropout = Dropout(dropout)

    @abstractmethod
    def activate(self, x: Tensor) -> Tensor:
        """Return the values after the activation."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the new values, position by position."""
        if self.gated:
            gate, value = self.inner(x_BTD).chunk(2, dim=-1)
            hidden = self.activate(gate) * value
        else:
            hidden = self.activate(self.inner(x_BTD))
        y_BTD: Tensor = self.out(self.dropout(hidden))
        return y_BTD


class ReLU(_TwoLayers):
    """Two linear maps with ReLU between them.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.3.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
        gated: whether the activation of one linear map gates another one (Shazeer 2020, arXiv:2002.05202).
        hidden: hidden width; None: what ``hidden_multiple`` says.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        return F.relu(x)


class GELU(_TwoLayers):
    """Two linear maps with GELU between them.

    Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
        gated: whether the activation of one linear map gates another one (Shazeer 2020, arXiv:2002.05202).
        hidden: hidden width; None: what ``hidden_multiple`` says.
        approximate: ``none``, the form with the error function, or ``tanh``, an approximation of it (GPT-2).
    """

    def __init__(
        self,
        dim: int,
        hidden_multiple: float = 4.0,
        bias: bool = False,
        dropout: float = 0.0,
        gated: bool = False,
        hidden: int | None = None,
        approximate: Literal["none", "tanh"] = "none",
    ) -> None:
        super().__init__(dim, hidden_multiple, bias, dropout, gated, hidden)
        self.approximate = approximate

    def activate(self, x: Tensor) -> Tensor:
        """Return x times the normal distribution function of x."""
        return F.gelu(x, approximate=self.approximate)


class SquaredReLU(_TwoLayers):
    """Two linear maps with the square of ReLU between them.

    So et al. 2021 (Primer), arXiv:2109.08668.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
        gated: whether the activation of one linear map gates another one (Shazeer 2020, arXiv:2002.05202).
        hidden: hidden width; None: what ``hidden_multiple`` says.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return max(x, 0) squared."""
        return F.relu(x).square()


class SiLU(_TwoLayers):
    """Two linear maps with SiLU (swish) between them.

    Hendrycks and Gimpel 2016, arXiv:1606.08415; Ramachandran et al. 2017, arXiv:1710.05941.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
        gated: whether the activation of one linear map gates another one (Shazeer 2020, arXiv:2002.05202).
        hidden: hidden width; None: what ``hidden_multiple`` says.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Return x times the logistic function of x."""
        return F.silu(x)


class SwiGLU(SiLU):
    """A linear map gated by the SiLU of another one, then a linear map back: ``silu`` with ``gated: true``.

    Shazeer 2020, arXiv:2002.05202. It has three matrices, so the hidden width is two thirds of ``hidden_multiple *
    dim``, rounded up to a multiple of 8: as many parameters as the others at the same ``hidden_multiple``.

    Args:
        dim: model width.
        hidden_multiple: what the hidden width of a network of the same size with two matrices would be, as a
            multiple of ``dim``.
        bias: whether the linear maps have biases.
        dropout: dropout of the hidden values.
        hidden: hidden width; None: what ``hidden_multiple`` says.
    """

    def __init__(
        self,
        dim: int,
        hidden_multiple: float = 4.0,
        bias: bool = False,
        dropout: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim, hidden_multiple, bias, dropout, True, hidden)
