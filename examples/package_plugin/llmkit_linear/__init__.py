"""Linear attention: a plugin of llmkit in a distribution of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Memory, Role, Sequence, State
from llmkit.errors import UserError


class LinearAttention(Attention):
    """Attention whose scores are products of positive features, so that the past fits into one matrix a head.

    Katharopoulos et al. 2020, arXiv:2006.16236, with elu(x) + 1 as the features. Training computes the scores of
    all pairs; decoding keeps a state that does not grow with the length.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal`` or ``bidirectional``.
        num_heads: number of heads.

    Raises:
        UserError: when the heads do not divide the width.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(self, dim: int, role: Role, num_heads: int = 4) -> None:
        super().__init__(dim, role)
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"linear attention: dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``."""
        B, T, _ = x_BTD.shape
        q_BHTE, k_BHTE, v_BHTE = self.qkv(x_BTD).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTE, k_BHTE = F.elu(q_BHTE) + 1, F.elu(k_BHTE) + 1
        # A one beside the values makes the sum of the scores the last channel of the weighted sum.
        v_BHTF = F.pad(v_BHTE, (0, 1), value=1.0)

        scores_BHTT = q_BHTE @ k_BHTE.transpose(-1, -2)
        mask = seq.mask(causal=self.role == "causal")
        if mask is not None:
            scores_BHTT = scores_BHTT.masked_fill(~mask, 0.0)
        y_BHTF = scores_BHTT @ v_BHTF
        if state is not None:
            y_BHTF = y_BHTF + self._past(q_BHTE, k_BHTE, v_BHTF, seq, state)
        y_BHTE = y_BHTF[..., :-1] / y_BHTF[..., -1:]
        y: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return y

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return the sum of nothing: keys times values, (B, H, E, E + 1), and the document it is about, (B,)."""
        if self.role != "causal":
            return None
        width = self.dim // self.num_heads
        sums = like.new_zeros(batch_size, self.num_heads, width, width + 1)
        return State(sums=sums, segment=like.new_ones(batch_size, dtype=torch.long))

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum as trained: 4 * length * dim; half of it when causal."""
        return 4.0 * length * self.dim * (0.5 if self.role == "causal" else 1.0)

    def _past(self, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTF: Tensor, seq: Sequence, state: State) -> Tensor:
        """Return what the queries read from the columns before these, and add these to the state."""
        segments_BT = torch.ones_like(seq.positions_BT) if seq.segments_BT is None else seq.segments_BT
        segments_BT = segments_BT.expand(len(q_BHTE), -1)
        same_BT = segments_BT == state["segment"][:, None]
        past_BHTF = (q_BHTE @ state["sums"]) * same_BT[:, None, :, None]

        # What goes on is the last document: of a new one, the sum so far is not part.
        last_B = torch.maximum(state["segment"], segments_BT.amax(-1))
        kept_BT = segments_BT == last_B[:, None]
        goes_on_B = state["segment"] == last_B
        new_BHEF = (k_BHTE * kept_BT[:, None, :, None]).transpose(-1, -2) @ v_BHTF
        state["sums"] = state["sums"] * goes_on_B[:, None, None, None] + new_BHEF
        state["segment"] = last_B
        state.length += q_BHTE.shape[2]
        return past_BHTF
