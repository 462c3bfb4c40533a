"""Softmax attention that subtracts one map from another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.cache import Cache, Lookup
from llmkit_plugins.attention.heads import join, nearest, split
from llmkit_plugins.attention.softmax import GroupedQuery, softmax_weights


class Differential(GroupedQuery):
    """Each head subtracts a second softmax map from the first, which cancels what both give to irrelevant positions.

    Ye et al. 2024, arXiv:2410.05258. A head has two queries and two keys of E channels and values of 2 E channels, so
    it has as many weights as ``multi_head``; the paper takes half as many heads as it would otherwise. The share that
    is subtracted is learned as in the paper, from four vectors that all heads of a layer share.

    Unlike the paper, ``lambda_init`` is the same in every layer, since an attention does not know its depth. There it
    is 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l: 0.2 in the first, towards 0.8 in later ones. So the first layers subtract
    more than the paper's at the start, and their outputs are smaller (by 0.2 for 0.8 in the first); the paper reports
    nearly the same loss with 0.8 or 0.5 everywhere. Also unlike it, queries and keys are normalised unless ``qk_norm``
    is off. Maps 0 to H - 1 are the first of each head, H to 2 H - 1 the second.

    Args:
        dim: model width; must be divisible by twice ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads, each with two maps.
        lambda_init: about the share of the second map that is subtracted at the start; the outputs are scaled by
            ``1 - lambda_init``. At least 0 and below 1.
        qk_norm: whether each map's queries and keys are normalised (arXiv:2010.04245).
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when twice the heads do not divide the width, or ``lambda_init`` is not a share below one.
    """

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        lambda_init: float = 0.8,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if num_heads >= 1 and dim % (2 * num_heads):
            raise UserError(
                f"dim {dim} is not divisible by twice num_heads {num_heads} (two maps a head); "
                f"nearest widths: {nearest(dim, 2 * num_heads)}"
            )
        if not 0 <= lambda_init < 1:
            raise UserError(f"lambda_init must be at least 0 and below 1, got {lambda_init}")
        super().__init__(dim, role, 2 * num_heads, 2 * num_heads, qk_norm, bias, dropout)
        self.scale = self.head_dim**-0.5  # written out, because queries are padded below
        self.lookup = Lookup(role, num_heads)  # one position bias for both maps of a head
        self.lambda_init = lambda_init
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(self.head_dim).normal_(std=0.1)) for _ in range(4)
        )
        self.head_scale = nn.Parameter(torch.ones(2 * self.head_dim))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``GroupedQuery.forward``."""
        q_BMTE, k, v, mask, is_causal = self.look(x_BTD, seq, memory, state)
        first, second = (  # attend: (B, H, T, 2 E) each
            self._map(q, k, v, mask, is_causal) for q, k in zip(q_BMTE.chunk(2, 1), k.chunk(2, 1), strict=True)
        )
        return self._finish(first - self._share(first.dtype) * second)  # subtract: (B, H, T, 2 E)

    def look(
        self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
        """Return queries and keys of each map, values of each head, the mask, and whether plain causal order holds."""
        M, H = self.num_heads, self.num_heads // 2  # maps, heads
        if self.role == "cross":
            q_BMTE = self.norm(split(self.q(x_BTD), M))  # project
            (k, v), mask, is_causal = self.lookup.memory(seq, memory, state, self.read)  # cache: see ``read``
        else:
            qk, v = self.qkv(x_BTD).split_with_sizes([2 * self.dim, self.dim], -1)  # project: (B, T, 2 D), (B, T, D)
            q_BMTE, k = seq.rotate(self.norm(split(qk, 2 * M))).chunk(2, 1)  # rotate: (B, M, T, E) each
            (k, v), mask, is_causal = self.lookup(q_BMTE, seq, state, k=k, v=split(v, H))  # cache: see ``read``
        return q_BMTE, k, v, mask, is_causal

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the first map of each head minus its share of the second."""
        q_BMTE, k_BMSE, v_BHSF, mask, is_causal = self.look(x_BTD, seq, memory, None)
        both = zip(q_BMTE.chunk(2, 1), k_BMSE.chunk(2, 1), strict=True)
        first, second = (softmax_weights(q, k, mask, is_causal, self.scale) for q, k in both)
        return Mixing(v_BHSF, first - self._share(first.dtype) * second, self._finish)

    def _share(self, dtype: torch.dtype) -> Tensor:
        """Return the share of the second map that is subtracted."""
        share = torch.dot(self.lambda_q1, self.lambda_k1).exp() - torch.dot(self.lambda_q2, self.lambda_k2).exp()
        return (share + self.lambda_init).to(dtype)

    def _finish(self, y_BHTF: Tensor) -> Tensor:
        """Return the heads' sums normalised, joined and projected, (B, T, D)."""
        scale = (1 - self.lambda_init) * self.head_scale
        y_BHTF = F.rms_norm(y_BHTF, (2 * self.head_dim,), scale.to(y_BHTF.dtype), eps=1e-6)
        y: Tensor = self.out(join(y_BHTF))  # out: (B, T, D)
        return y

    def read(self, memory: Memory) -> dict[str, Tensor]:
        """Return keys of each map, (B, M, S, E), and values of each head, (B, H, S, 2 E), of an encoder's memory."""
        k, v = self.kv(memory.x_BSD).chunk(2, -1)
        return {"k": self.norm(split(k, self.num_heads)), "v": split(v, self.num_heads // 2)}

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of keys and values; a ``cross`` one is filled from the memory at the first call."""
        if self.role != "causal":
            return State() if self.role == "cross" else None
        maps, width = self.num_heads, self.head_dim
        return Cache(batch_size, max_length, like, k=(maps, width), v=(maps // 2, 2 * width))

    def mixing_flops(self, length: int) -> float:
        """Two maps of E channels with sums of 2 E values: 6 * length * dim; half of it when causal."""
        return 1.5 * super().mixing_flops(length)

    def _map(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return the values weighted by one of the two maps, (B, H, T, 2 E)."""
        if q.shape[2] > 1:
            # Keys as wide as values take the kernels that never hold all scores; a single query has few.
            q, k = (F.pad(x, (0, self.head_dim)) for x in (q, k))
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
