"""An attention variant: softmax attention of several heads, written out. Put your own idea where the scores are."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit import register
from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.ops.elementwise import rms_norm
from llmkit.ops.fused import fused
from llmkit.sequence import Memory, Sequence, State


@register("attention", "template")
class Template(Attention):
    """Softmax attention of several heads, written out.

    It has the weights, the defaults and the numbers of ``multi_head``, so that what you change is all that a comparison
    with it measures.

    Shapes: B batch, T positions of the layer's input, S positions attended to, D model width, H heads of E channels.

    Args:
        dim: model width; must be divisible by ``num_heads`` unless ``head_dim`` is given.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads.
        qk_norm: whether each head's queries and keys are normalised, which keeps the scores bounded.
        bias: whether the linear maps have biases.
        dropout: probability that an attention weight is dropped in training.
        head_dim: width of a head; None: ``dim / num_heads``.
        scale: what scores are multiplied by; None: one over the root of the width of a head.

    Raises:
        UserError: when the heads do not divide the width, or ``dropout`` is not a probability below one.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, role)
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise UserError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim or dim // num_heads, dropout
        self.scale = 1 / math.sqrt(self.head_dim) if scale is None else scale
        inner = num_heads * self.head_dim
        # Maps computed as one are marked: the optimizer Muon has to treat each by itself.
        if role == "cross":
            self.q = nn.Linear(dim, inner, bias=bias)
            self.kv = fused(nn.Linear(dim, 2 * inner, bias=bias), [inner] * 2)
        else:
            self.qkv = fused(nn.Linear(dim, 3 * inner, bias=bias), [inner] * 3)
        self.out = nn.Linear(inner, dim, bias=bias)  # a layer named `out` starts small, as residual outputs should
        self.qk_scale = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D)."""
        # Cross-attention attends to the encoder's output, the other roles to their own input.
        source = seq
        if memory is None:
            q_BHTE, k_BHSE, v_BHSE = map(self._split, self.qkv(x_BTD).chunk(3, -1))
        else:
            q_BHTE, source = self._split(self.q(x_BTD)), memory.seq
            k_BHSE, v_BHSE = map(self._split, self.kv(memory.x_BSD).chunk(2, -1))
        if self.qk_scale is not None:
            q_BHTE, k_BHSE = rms_norm(q_BHTE, self.qk_scale, 1e-6), rms_norm(k_BHSE, self.qk_scale, 1e-6)

        # Step 1, positions: the position plugin rotates queries and keys.
        if memory is None:
            q_BHTE, k_BHSE = seq.rotate(q_BHTE), seq.rotate(k_BHSE)

        # Step 2, decoding: with a state, the input continues after the columns that were seen before.
        if state is not None:
            k_BHSE, v_BHSE, source = self._remember(state, k_BHSE, v_BHSE, source)
            state.length += x_BTD.shape[1]

        scores_BHTS = q_BHTE @ k_BHSE.transpose(2, 3) * self.scale
        bias_BHTS = seq.bias(source, self.num_heads) if memory is None else None
        if bias_BHTS is not None:
            scores_BHTS = scores_BHTS + bias_BHTS.to(scores_BHTS.dtype)

        # Step 3, the mask: no looking ahead if causal; never at padding or at other documents packed into the row.
        mask_BHTS = seq.mask(source, causal=self.role == "causal")
        if mask_BHTS is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask_BHTS, torch.finfo(scores_BHTS.dtype).min)
        weights_BHTS = F.dropout(scores_BHTS.softmax(-1), self.dropout, self.training)
        y_BTD: Tensor = self.out((weights_BHTS @ v_BHSE).transpose(1, 2).flatten(2))
        return y_BTD

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return the decoding state before the first column: no keys, no values."""
        if self.role == "bidirectional":
            return None
        nothing_BH0E = like.new_zeros(batch_size, self.num_heads, 0, self.head_dim)
        numbers_B0 = torch.zeros(batch_size, 0, dtype=torch.long, device=like.device)
        return State(k=nothing_BH0E, v=nothing_BH0E, positions=numbers_B0, segments=numbers_B0)

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * length * H * E; half of that if causal, on average over the positions."""
        return 4.0 * length * self.num_heads * self.head_dim * (0.5 if self.role == "causal" else 1.0)

    def _split(self, x_BTD: Tensor) -> Tensor:
        """Return the channels of each head, (B, H, T, E)."""
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)

    def _remember(
        self, state: State, k_BHSE: Tensor, v_BHSE: Tensor, source: Sequence
    ) -> tuple[Tensor, Tensor, Sequence]:
        """Append new columns to the state and return all of it; the encoder's output is stored only once."""
        if self.role == "causal" or not state.length:
            segments_BS = torch.ones_like(source.positions_BT) if source.segments_BT is None else source.segments_BT
            state["k"], state["v"] = torch.cat([state["k"], k_BHSE], 2), torch.cat([state["v"], v_BHSE], 2)
            for name, numbers in {"positions": source.positions_BT, "segments": segments_BS}.items():
                state[name] = torch.cat([state[name], numbers.expand(len(k_BHSE), -1)], 1)
        return state["k"], state["v"], Sequence(state["positions"], state["segments"])
