"""A feedforward: transforms each position on its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Feedforward


@register("feedforward", "template")
class Template(Feedforward):
    """A linear layer gated by the GELU of another one, then a linear layer back to the model width.

    Args:
        dim: model width.
        hidden_multiple: hidden width as a multiple of ``dim``.
    """

    def __init__(self, dim: int, hidden_multiple: float = 3.0) -> None:
        super().__init__(dim)
        hidden = round(hidden_multiple * dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.inner = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)  # a layer named `out` starts small, as residual outputs should

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the new values, (B, T, D), each position on its own."""
        hidden_BTF = F.gelu(self.gate(x_BTD)) * self.inner(x_BTD)  # put your own idea here
        y_BTD: Tensor = self.out(hidden_BTF)
        return y_BTD
