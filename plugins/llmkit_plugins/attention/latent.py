"""Softmax attention whose keys and values are made from a narrow vector.

Here R is the width of that vector, P the width of the rotary key and C the number of columns a decoding state has
room for.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.ops.fused import fused
from llmkit.ops.lora import whole_weight
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.cache import Cache, Lookup
from llmkit_plugins.attention.heads import check_dropout, check_heads, join, split
from llmkit_plugins.attention.softmax import softmax_weights


class Latent(Attention):
    """Keys and values of all heads come from one narrow vector per position, which is all that decoding stores.

    Multi-head latent attention, DeepSeek-AI 2024, arXiv:2405.04434. Position enters through a second, rotary key that
    all heads share: a key that is rotated after it was made from the latent cannot be absorbed as below. Unlike the
    paper's, queries are not compressed.

    With k = U c for a latent c, a score is q . (U c) = (U^T q) . c. So there are two ways to the same numbers: make
    keys and values from every latent, or move the queries into the space of the latents. The second is cheaper where
    few queries look at many columns, as in decoding.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``; in ``cross`` nothing is turned and there is no rotary key.
        num_heads: number of heads.
        kv_rank: width of the latent. None: half of ``dim``, with which there are about as many weights as in
            ``multi_head``.
        rope_dim: width of the rotary key; even. None: about half the width of a head.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when the heads do not divide the width, the rank is below one, or ``rope_dim`` is not even.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        kv_rank: int | None = None,
        rope_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, role)
        check_dropout(dropout)
        check_heads(dim, num_heads, num_heads)
        self.num_heads, self.head_dim, self.dropout = num_heads, dim // num_heads, dropout
        self.kv_rank = max(1, dim // 2) if kv_rank is None else kv_rank
        self.rope_dim = max(2, self.head_dim // 4 * 2) if rope_dim is None else rope_dim
        if self.kv_rank < 1:
            raise UserError(f"kv_rank must be at least 1, got {kv_rank}")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise UserError(f"rope_dim must be even and at least 2, got {rope_dim}")
        if role == "cross":
            self.rope_dim = 0
        self.scale = (self.head_dim + self.rope_dim) ** -0.5
        self.q = nn.Linear(dim, num_heads * (self.head_dim + self.rope_dim), bias=False)
        narrow = [self.kv_rank, self.rope_dim] if self.rope_dim else [self.kv_rank]
        self.down = fused(nn.Linear(dim, sum(narrow), bias=False), narrow)
        self.up = fused(nn.Linear(self.kv_rank, 2 * dim, bias=False), [dim] * 2)
        self.out = nn.Linear(dim, dim, bias=False)
        self.latent_scale = nn.Parameter(torch.ones(self.kv_rank))
        self.lookup = Lookup(role, num_heads)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``GroupedQuery.forward``."""
        q, latent, mask, is_causal = self._look(x_BTD, seq, memory, state)

        # Products per head, rotary channels aside, over two. Absorbed: T queries and T outputs through ``up``, then R
        # instead of E channels for each pair; expanded: S keys and S values through ``up``.
        T, S, E, R = q.shape[2], latent.shape[1], self.head_dim, self.kv_rank
        absorbed = T * E * R + T * S * R < S * E * R + T * S * E
        y_BHTE = (self._absorbed if absorbed else self._expanded)(q, latent, mask, is_causal)  # attend
        y: Tensor = self.out(join(y_BHTE))  # out: (B, T, D)
        return y

    def _look(
        self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Return queries, latents with their rotary keys, the mask, and whether plain causal order holds."""
        E, R, P = self.head_dim, self.kv_rank, self.rope_dim
        q = split(self.q(x_BTD), self.num_heads)  # project: (B, H, T, E + P)
        if self.role == "cross":
            (latent,), mask, is_causal = self.lookup.memory(seq, memory, state, self.read)  # cache: (B, S, R)
        else:
            latent, k_BTP = self.down(x_BTD).split([R, P], -1)  # project: (B, T, R), (B, T, P)
            q_BHTE, q_BHTP = q.split([E, P], -1)
            q = torch.cat([q_BHTE, seq.rotate(q_BHTP)], -1)  # rotate: (B, H, T, E + P)
            k_BTP = seq.rotate(k_BTP[:, None])[:, 0]  # rotate: (B, T, P)
            latent = torch.cat([self._norm(latent), k_BTP], -1)  # (B, T, R + P)
            (latent,), mask, is_causal = self.lookup(q, seq, state, latent=latent)  # cache: (B, S, R + P)
        return q, latent, mask, is_causal

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the weights of the softmax over keys that are made from the latents."""
        q, latent, mask, is_causal = self._look(x_BTD, seq, memory, None)
        k, v = self._keys_and_values(latent)
        return Mixing(v, softmax_weights(q, k, mask, is_causal, self.scale), lambda y_BHTE: self.out(join(y_BHTE)))

    def read(self, memory: Memory) -> dict[str, Tensor]:
        """Return the latents of an encoder's memory, (B, S, R)."""
        return {"latent": self._norm(self.down(memory.x_BSD))}

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of latents with the rotary key next to them, (B, S, R + P); (B, S, R) if ``cross``."""
        if self.role != "causal":
            return State() if self.role == "cross" else None
        return Cache(batch_size, max_length, like, latent=(self.kv_rank + self.rope_dim,))

    def mixing_flops(self, length: int) -> float:
        """Scores of head and rotary channels and weighted sum of the head's; half of it when causal."""
        flops = 2.0 * length * self.num_heads * (2 * self.head_dim + self.rope_dim)
        return flops * (0.5 if self.role == "causal" else 1.0)

    def _norm(self, latent_BTR: Tensor) -> Tensor:
        return F.rms_norm(latent_BTR, (self.kv_rank,), self.latent_scale.to(latent_BTR.dtype), eps=1e-6)

    def _expanded(self, q: Tensor, latent_BSZ: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Make keys and values from the latents and look at them."""
        return self._weighted(q, *self._keys_and_values(latent_BSZ), mask, is_causal)

    def _keys_and_values(self, latent_BSZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys, (B, H, S, E + P), and values, (B, H, S, E), of latents with their rotary keys."""
        latent_BSR, k_BSP = latent_BSZ.split([self.kv_rank, self.rope_dim], -1)
        kv: Tensor = self.up(latent_BSR)
        k_BHSE, v_BHSE = kv.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, 1)
        k_BHSP = k_BSP[:, None].expand(-1, self.num_heads, -1, -1)
        return torch.cat([k_BHSE, k_BHSP], -1), v_BHSE

    def _absorbed(self, q: Tensor, latent_BSZ: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Look at the latents themselves, which are keys and values that all heads share."""
        k_HER, v_HER = whole_weight(self.up).view(2, self.num_heads, self.head_dim, self.kv_rank)
        q_BHTE, q_BHTP = q.split([self.head_dim, self.rope_dim], -1)
        q = torch.cat([q_BHTE @ k_HER, q_BHTP], -1)
        # The rotary channels are summed along and dropped, which costs less than values of their own.
        y = self._weighted(q, latent_BSZ[:, None], latent_BSZ[:, None], mask, is_causal)
        y_BHTE: Tensor = y[..., : self.kv_rank] @ v_HER.mT
        return y_BHTE

    def _weighted(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        # Values as wide as keys take the kernels that never hold all scores.
        y: Tensor = F.scaled_dot_product_attention(
            q,
            k,
            F.pad(v, (0, k.shape[-1] - v.shape[-1])),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return y[..., : v.shape[-1]]
