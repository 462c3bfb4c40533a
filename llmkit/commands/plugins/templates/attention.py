"""An attention variant: one softmax head, written out. Put your own idea where the scores are."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence, State


@register("attention", "template")
class Template(Attention):
    """Softmax attention with one head over the whole width, written out.

    Shapes: B batch, T positions of the layer's input, S positions attended to, D model width.

    Args:
        dim: model width.
        role: ``causal``, ``bidirectional`` or ``cross``.
        bias: whether the linear maps have biases.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(self, dim: int, role: Role, bias: bool = False) -> None:
        super().__init__(dim, role)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)  # a layer named `out` starts small, as residual outputs should

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D)."""
        # Cross-attention attends to the encoder's output, the other roles to their own input.
        source_BSD, source = (x_BTD, seq) if memory is None else memory
        q_BTD, k_BSD, v_BSD = self.query(x_BTD), self.key(source_BSD), self.value(source_BSD)

        # Step 1, positions: the position plugin rotates queries and keys of shape (B, heads, T, D), here with one head.
        if memory is None:
            q_BTD, k_BSD = seq.rotate(q_BTD[:, None])[:, 0], seq.rotate(k_BSD[:, None])[:, 0]

        # Step 2, decoding: with a state, the input continues after the columns that were seen before.
        if state is not None:
            k_BSD, v_BSD, source = self._remember(state, k_BSD, v_BSD, source)
            state.length += x_BTD.shape[1]

        scores_BTS = q_BTD @ k_BSD.transpose(1, 2) / math.sqrt(self.dim)
        bias_BHTS = seq.bias(source, num_heads=1) if memory is None else None
        if bias_BHTS is not None:
            scores_BTS = scores_BTS + bias_BHTS[:, 0].to(scores_BTS.dtype)

        # Step 3, the mask: no looking ahead if causal; never at padding or at other documents packed into the row.
        mask_BHTS = seq.mask(source, causal=self.role == "causal")
        if mask_BHTS is not None:
            scores_BTS = scores_BTS.masked_fill(~mask_BHTS[:, 0], torch.finfo(scores_BTS.dtype).min)
        y_BTD: Tensor = self.out(scores_BTS.softmax(-1) @ v_BSD)
        return y_BTD

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return the decoding state before the first column: no keys, no values."""
        if self.role == "bidirectional":
            return None
        nothing_B0D = like.new_zeros(batch_size, 0, self.dim)
        numbers_B0 = torch.zeros(batch_size, 0, dtype=torch.long, device=like.device)
        return State(k=nothing_B0D, v=nothing_B0D, positions=numbers_B0, segments=numbers_B0)

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * length * dim; half of that if causal, on average over the positions."""
        return 4.0 * length * self.dim * (0.5 if self.role == "causal" else 1.0)

    def _remember(
        self, state: State, k_BSD: Tensor, v_BSD: Tensor, source: Sequence
    ) -> tuple[Tensor, Tensor, Sequence]:
        """Append new columns to the state and return all of it; the encoder's output is stored only once."""
        if self.role == "causal" or not state.length:
            segments_BS = torch.ones_like(source.positions_BT) if source.segments_BT is None else source.segments_BT
            new = {"k": k_BSD, "v": v_BSD, "positions": source.positions_BT, "segments": segments_BS}
            for name, value in new.items():
                value = value.expand(len(k_BSD), *value.shape[1:])
                state[name] = torch.cat([state[name], value], dim=1)
        return state["k"], state["v"], Sequence(state["positions"], state["segments"])
