"""Softmax attention: one head, several heads, or several heads that share keys and values.

Copy this file to start a variant of your own. ``GroupedQuery.forward`` is the whole computation; masks, padding,
position biases and decoding are in ``Lookup`` and need no change. K is the number of key/value heads; S is the number
of columns to look at: T, and when decoding those of earlier calls as well.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.ops.elementwise import rms_norm
from llmkit.ops.fused import fused
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.cache import Cache, Lookup
from llmkit_plugins.attention.heads import check_dropout, check_heads, join, split


class GroupedQuery(Attention):
    """Several query heads share one key/value head, which makes the decoding cache smaller; one is multi-query.

    Ainslie et al. 2023, arXiv:2305.13245; with ``num_kv_heads=1`` it is Shazeer 2019, arXiv:1911.02150. Normalised
    queries and keys: Henry et al. 2020, arXiv:2010.04245, here with RMS normalisation and one scale per channel of a
    head that all heads, queries and keys share.

    Args:
        dim: model width; must be divisible by ``num_heads`` unless ``head_dim`` is given.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; must divide ``num_heads``.
        qk_norm: whether each head's queries and keys are normalised, which keeps the scores bounded; ``separate``:
            queries have a scale of their own, and keys another (Qwen3, arXiv:2505.09388).
        bias: whether the projections have biases; ``qkv``: all but the output projection (Qwen2, arXiv:2407.10671).
        dropout: probability that an attention weight is dropped in training.
        head_dim: width of a head; None: ``dim / num_heads``.
        scale: what scores are multiplied by; None: one over the root of the width of a head (T5 has 1).

    Raises:
        UserError: when the heads do not divide the width or each other, or ``dropout`` is not a probability below one.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        qk_norm: bool | Literal["separate"] = True,
        bias: bool | Literal["qkv"] = False,
        dropout: float = 0.0,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, role)
        check_dropout(dropout)
        check_heads(dim, num_heads, num_kv_heads, head_dim)
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f"scale must be above 0, got {scale}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.dropout, self.scale = dropout, scale
        q_dim, kv_dim = num_heads * self.head_dim, 2 * num_kv_heads * self.head_dim
        if role == "cross":
            self.q = nn.Linear(dim, q_dim, bias=bool(bias))
            self.kv = fused(nn.Linear(dim, kv_dim, bias=bool(bias)), [kv_dim // 2] * 2)
        else:
            sizes = [q_dim, kv_dim // 2, kv_dim // 2]
            self.qkv = fused(nn.Linear(dim, q_dim + kv_dim, bias=bool(bias)), sizes)
        # A map called `out` starts small, as residual outputs should.
        self.out = nn.Linear(q_dim, dim, bias=bias is True)
        self.qk_scale = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None
        self.k_scale = nn.Parameter(torch.ones(self.head_dim)) if qk_norm == "separate" else None
        self.lookup = Lookup(role, num_heads)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``.

        Raises:
            ValueError: when the state has no room for the columns, or a cross-attention gets no memory.
        """
        y_BHTE = self.attend(*self.look(x_BTD, seq, memory, state))  # attend: (B, H, T, E)
        y: Tensor = self.out(join(y_BHTE))  # out: (B, T, D)
        return y

    def look(
        self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
        """Return queries, keys, values, the mask, and whether plain causal order holds."""
        H, K = self.num_heads, self.num_kv_heads
        if self.role == "cross":
            q_BHTE = self.norm(split(self.q(x_BTD), H))  # project: (B, H, T, E)
            (k, v), mask, is_causal = self.lookup.memory(seq, memory, state, self.read)  # cache: (B, K, S, E) each
        else:
            qk, v = split(self.qkv(x_BTD), H + 2 * K).split_with_sizes([H + K, K], 1)  # project: (B, H + K or K, T, E)
            q_BHTE, k = self.turn(qk, seq)  # rotate: (B, H or K, T, E)
            (k, v), mask, is_causal = self.lookup(q_BHTE, seq, state, k=k, v=v)  # cache: (B, K, S, E) each
        return q_BHTE, k, v, mask, is_causal

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the weights of the softmax, computed outside the fused kernel."""
        q, k, v, mask, is_causal = self.look(x_BTD, seq, memory, None)
        k, v = (x_BKSE.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for x_BKSE in (k, v))
        return Mixing(v, softmax_weights(q, k, mask, is_causal, self.scale), lambda y_BHTE: self.out(join(y_BHTE)))

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return softmax(q k^T scale) v, (B, H, T, E)."""
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def turn(self, qk_BGTE: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        """Return queries, (B, H, T, E), and keys, (B, K, T, E), normalised and turned by their positions."""
        sizes = [self.num_heads, self.num_kv_heads]
        if self.k_scale is None:
            return seq.rotate(self.norm(qk_BGTE)).split_with_sizes(sizes, 1)
        q, k = qk_BGTE.split_with_sizes(sizes, 1)
        return seq.rotate(self.norm(q)), seq.rotate(self.norm(k, self.k_scale))

    def norm(self, x_BHTE: Tensor, scale_E: Tensor | None = None) -> Tensor:
        """Return normalised queries or keys; without a scale of their own, they are scaled like queries."""
        scale_E = self.qk_scale if scale_E is None else scale_E
        return x_BHTE if scale_E is None else rms_norm(x_BHTE, scale_E, 1e-6)

    def read(self, memory: Memory) -> dict[str, Tensor]:
        """Return keys and values of an encoder's memory, (B, K, S, E)."""
        k_BKSE, v_BKSE = split(self.kv(memory.x_BSD), 2 * self.num_kv_heads).chunk(2, 1)
        return {"k": self.norm(k_BKSE, self.k_scale), "v": v_BKSE}

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of keys and values; a ``cross`` one is filled from the memory at the first call."""
        if self.role != "causal":
            return State() if self.role == "cross" else None
        column = (self.num_kv_heads, self.head_dim)
        return Cache(batch_size, max_length, like, k=column, v=column)

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * length * H * E; half of it when causal, the average over the positions."""
        return 4.0 * length * self.num_heads * self.head_dim * (0.5 if self.role == "causal" else 1.0)


def softmax_weights(
    q_BHTE: Tensor, k_BHSE: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Return softmax(q k^T scale), (B, H, T, S), under a mask as ``Lookup`` gives it; zeros where nothing is seen."""
    scores_BHTS = q_BHTE @ k_BHSE.mT * (q_BHTE.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTE.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores_BHTS = scores_BHTS + mask
    return scores_BHTS.softmax(-1).nan_to_num()


class MultiHead(GroupedQuery):
    """Several heads, each with its own queries, keys and values (the usual choice).

    Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        dim: model width; must be divisible by ``num_heads`` unless ``head_dim`` is given.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads.
        qk_norm: whether each head's queries and keys are normalised (arXiv:2010.04245); ``separate``: with a scale for
            queries and another for keys.
        bias: whether the projections have biases; ``qkv``: all but the output projection.
        dropout: probability that an attention weight is dropped in training.
        head_dim: width of a head; None: ``dim / num_heads``.
        scale: what scores are multiplied by; None: one over the root of the width of a head (T5 has 1).

    Raises:
        UserError: when the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        qk_norm: bool | Literal["separate"] = True,
        bias: bool | Literal["qkv"] = False,
        dropout: float = 0.0,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, role, num_heads, num_heads, qk_norm, bias, dropout, head_dim, scale)


class Standard(GroupedQuery):
    """One head over the whole width: scaled dot-product attention as it is written down.

    Vaswani et al. 2017, arXiv:1706.03762, equation 1.

    Args:
        dim: model width.
        role: ``causal``, ``bidirectional`` or ``cross``.
        qk_norm: whether queries and keys are normalised (arXiv:2010.04245).
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.
    """

    def __init__(self, dim: int, role: Role, qk_norm: bool = True, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dim, role, 1, 1, qk_norm, bias, dropout)
