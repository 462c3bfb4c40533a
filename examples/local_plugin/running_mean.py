"""The mean of everything so far in the place of attention."""

from __future__ import annotations

from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence, State


@register("attention", "running_mean")
class RunningMean(Attention):
    """Each position reads the mean of its document up to itself, through a gate (after arXiv:1805.00631)."""

    def __init__(self, dim: int, role: Role, bias: bool = False) -> None:
        super().__init__(dim, role)
        self.value, self.gate, self.out = (nn.Linear(dim, dim, bias=bias) for _ in range(3))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        mask = seq.mask(causal=True)  # (B or 1, 1, T, T): True where a position may read another; None: everywhere
        seen_BTT = x_BTD.new_ones(1, *[x_BTD.shape[1]] * 2) if mask is None else mask[:, 0].to(x_BTD.dtype)
        mean_BTD = seen_BTT @ self.value(x_BTD) / seen_BTT.sum(-1, keepdim=True)
        out_BTD: Tensor = self.out(self.gate(x_BTD).sigmoid() * mean_BTD)
        return out_BTD
