"""The attention-free transformer: a plugin of llmkit in a distribution of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from llmkit import UserError
from llmkit.contracts import Attention, Role
from llmkit.ops.backend import without_autocast
from llmkit.sequence import Memory, Sequence, State


class AFT(Attention):
    """Each channel reads a weighted mean of the values so far through a gate (AFT-simple).

    Zhai et al. 2021, arXiv:2105.14103. A position counts exp(key), whoever reads it; a tanh keeps the keys within
    ``limit``, so that no sum overflows. Here F = 2 D: the weighted values and the weights, side by side.

    Args:
        dim: model width.
        role: ``causal`` or ``bidirectional``.
        limit: bound of the keys.

    Raises:
        UserError: when the limit is out of range.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(self, dim: int, role: Role, limit: float = 8.0) -> None:
        super().__init__(dim, role)
        if not 0 < limit <= 20:
            raise UserError(f"aft: limit must be above 0 and at most 20, got {limit}")
        self.limit = limit
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``."""
        q_BTD, k_BTD, v_BTD = self.qkv(x_BTD).chunk(3, -1)
        # Sums over a long text do not fit into half precision.
        exact = torch.promote_types(k_BTD.dtype, torch.float32)
        weight_BTD = (self.limit * torch.tanh(k_BTD.to(exact) / self.limit)).exp()
        terms_BTF = torch.cat([weight_BTD * v_BTD, weight_BTD], -1)

        mask = seq.mask(causal=self.role == "causal")  # (B or 1, 1, T, T); None: everything may be seen
        seen = terms_BTF.new_ones(1, *[x_BTD.shape[1]] * 2) if mask is None else mask[:, 0].to(terms_BTF.dtype)
        with without_autocast(x_BTD):
            sums_BTF = seen @ terms_BTF
        if state is not None:
            sums_BTF = sums_BTF + self._past(terms_BTF, seq, state)
        values_BTD, weights_BTD = sums_BTF.chunk(2, -1)
        y_BTD: Tensor = self.out((q_BTD.sigmoid() * values_BTD / weights_BTD).to(x_BTD.dtype))
        return y_BTD

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return sums of nothing, (B, F), and the document they are about, (B,)."""
        if self.role != "causal":
            return None
        # Many small terms are added to a large sum: never in half precision.
        exact = torch.promote_types(like.dtype, torch.float32)
        sums_BF = like.new_zeros(batch_size, 2 * self.dim, dtype=exact)
        return State(sums=sums_BF, segment=like.new_ones(batch_size, dtype=torch.long))

    def mixing_flops(self, length: int) -> float:
        """The sums as trained: 4 * length * dim; half of it when causal."""
        return 4.0 * length * self.dim * (0.5 if self.role == "causal" else 1.0)

    def _past(self, terms_BTF: Tensor, seq: Sequence, state: State) -> Tensor:
        """Return what each column reads of the columns before these, (B, T, F), and add these to the state."""
        segments_BT = torch.ones_like(seq.positions_BT) if seq.segments_BT is None else seq.segments_BT
        segments_BT = segments_BT.expand(len(terms_BTF), -1)
        before_B, sums_BF = state["segment"], state["sums"]
        past_BTF = sums_BF[:, None] * (segments_BT == before_B[:, None])[..., None]

        # What goes on is the last document: of a new one, the sums so far are not part.
        last_B = torch.maximum(before_B, segments_BT.amax(-1))
        new_BF = (terms_BTF * (segments_BT == last_B[:, None])[..., None]).sum(1)
        state["sums"] = sums_BF * (before_B == last_B)[:, None] + new_BF
        state["segment"] = last_B
        state.length += terms_BTF.shape[1]
        return past_BTF
