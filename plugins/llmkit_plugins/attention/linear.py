"""Attention without a softmax, whose past fits into one matrix per head: linear attention and retention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.cache import from_memory
from llmkit_plugins.attention.chunked import Chunks, document_sums, empty_state, flops, pairs, read_documents
from llmkit_plugins.attention.heads import check_heads, join, split


class Linear(Attention):
    """Attention whose scores are products of positive features, in time linear in the length.

    Katharopoulos et al. 2020, arXiv:2006.16236, with elu(x) + 1 as the features. Rotary positions turn the features in
    the weighted sum of the values only; the sum of the weights, which it is divided by, has to stay positive (Su et al.
    2021, arXiv:2104.09864). ALiBi changes nothing here. The decoding state is one matrix per head.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads.

    Raises:
        UserError: when the heads do not divide the width.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(self, dim: int, role: Role, num_heads: int = 4) -> None:
        super().__init__(dim, role)
        check_heads(dim, num_heads, num_heads)
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``.

        Raises:
            ValueError: when a cross-attention gets no memory.
        """
        q_BHTE = features(split(self.q(x_BTD), self.num_heads))
        if self.role == "cross":
            sums_BMHEF = from_memory(seq, memory, state, self._read)["sums"]
            y_BHTF = read_documents(q_BHTE, sums_BMHEF, seq)
            values_BHTE, weights_BHT1 = y_BHTF[..., :-1], y_BHTF[..., -1:]
        else:
            k_BHTE, v_BHTE = self._keys_and_values(x_BTD)
            chunks = Chunks(seq, causal=self.role == "causal", state=state)
            values_BHTE = chunks.mix(seq.rotate(q_BHTE), seq.rotate(k_BHTE), v_BHTE, "values")
            weights_BHT1 = chunks.mix(q_BHTE, k_BHTE, torch.ones_like(v_BHTE[..., :1]), "weights")
        y_BHTE = values_BHTE / weights_BHT1.clamp(min=1e-12)  # nothing to read: zero, not NaN
        y: Tensor = self.out(join(y_BHTE.to(x_BTD.dtype)))
        return y

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the products of the features, divided by their sums."""
        q_BHTE = features(split(self.q(x_BTD), self.num_heads))
        k_BHSE, v_BHSE = self._keys_and_values(x_BTD if memory is None else memory.x_BSD)
        if memory is None:
            seen = pairs(seq, causal=self.role == "causal")
            products_BHTS = (seq.rotate(q_BHTE) @ seq.rotate(k_BHSE).mT) * seen
        else:
            mask = seq.mask(memory.seq, causal=False)
            seen = torch.ones((), device=x_BTD.device) if mask is None else mask
            products_BHTS = (q_BHTE @ k_BHSE.mT) * seen
        sums_BHT1 = ((q_BHTE @ k_BHSE.mT) * seen).sum(-1, keepdim=True)
        weights_BHTS = products_BHTS / sums_BHT1.clamp(min=1e-12)
        return Mixing(v_BHSE, weights_BHTS.to(v_BHSE.dtype), lambda y_BHTE: self.out(join(y_BHTE)))

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return empty sums, (B, H, E, E) and (B, H, E, 1); a ``cross`` state is filled at the first call."""
        if self.role == "bidirectional":
            return None
        if self.role == "cross":
            return State()
        H, E = self.num_heads, self.dim // self.num_heads
        return empty_state(like, batch_size, values=(H, E, E), weights=(H, E, 1))

    def mixing_flops(self, length: int) -> float:
        """Pairs of columns within a chunk, and the matrix of each head written and read; the same for the weights."""
        values = flops(self.role, length, self.dim, self.dim, self.num_heads)
        return values + flops(self.role, length, self.dim, self.num_heads, self.num_heads)

    def _keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return features(split(self.k(x_BTD), self.num_heads)), split(self.v(x_BTD), self.num_heads)

    def _read(self, memory: Memory) -> dict[str, Tensor]:
        k_BHSE, v_BHSE = self._keys_and_values(memory.x_BSD)
        # A one after the values: the last channel is the sum of the weights.
        return {"sums": document_sums(k_BHSE, F.pad(v_BHSE, (0, 1), value=1.0), memory.seq)}


class Retention(Attention):
    """Retention: products of queries and keys that decay with distance, at a different rate for each head.

    The multi-scale retention of Sun et al. 2023, arXiv:2307.08621: head h forgets the share 2 ** (-5 - h) per position;
    a group norm with one group per head and a gate follow. Unlike the authors' code, the norm subtracts the mean, as
    group norms do, and has a scale and a shift per channel; the output map could absorb the scale, but not the shift.
    Unlike the paper, values are as wide as the model (there twice), scores are not divided by their sums, which the
    norm makes up for, and queries and keys are rotated only if the network's position encoding is rotary. A
    bidirectional one, which the paper does not have, decays to both sides. ALiBi changes nothing here. The decoding
    state is one matrix per head.

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
        check_heads(dim, num_heads, num_heads)
        self.num_heads = num_heads
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(num_heads, dim, eps=1e-6)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``."""
        q_BHTE, k_BHTE, v_BHTE = self._parts(x_BTD, seq)
        chunks = Chunks(seq, causal=self.role == "causal", state=state, rate_H=self._rate(x_BTD, seq))
        return self._finish(x_BTD, chunks.mix(q_BHTE, k_BHTE, v_BHTE, "sums"))

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the decayed products of queries and keys."""
        q_BHTE, k_BHTE, v_BHTE = self._parts(x_BTD, seq)
        weights_BHTS = (q_BHTE @ k_BHTE.mT) * pairs(seq, causal=self.role == "causal", rate_H=self._rate(x_BTD, seq))
        return Mixing(v_BHTE, weights_BHTS.to(v_BHTE.dtype), lambda y_BHTE: self._finish(x_BTD, y_BHTE))

    def _parts(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, turned by their positions, (B, H, T, E)."""
        q_BHTE, k_BHTE, v_BHTE = (split(part(x_BTD), self.num_heads) for part in (self.q, self.k, self.v))
        k_BHTE = k_BHTE * k_BHTE.shape[-1] ** -0.5
        return seq.rotate(q_BHTE), seq.rotate(k_BHTE), v_BHTE

    def _rate(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        """Return how fast each head forgets, (H,)."""
        exact = torch.promote_types(x_BTD.dtype, torch.float32)
        memo_key = ("retention", self.num_heads, exact)
        if memo_key not in seq.memo:  # for all layers
            powers_H = torch.arange(5, 5 + self.num_heads, dtype=exact, device=x_BTD.device)
            seq.memo[memo_key] = -torch.log1p(-(2.0**-powers_H))
        rate_H: Tensor = seq.memo[memo_key]
        return rate_H

    def _finish(self, x_BTD: Tensor, y_BHTE: Tensor) -> Tensor:
        """Return the heads' sums normalised, gated and projected, (B, T, D)."""
        gate_BTD = F.silu(self.gate(x_BTD))
        y: Tensor = self.out(gate_BTD * self._normalised(join(y_BHTE)).to(gate_BTD.dtype))
        return y

    def _normalised(self, y_BTD: Tensor) -> Tensor:
        """Return the group norm in the dtype of the sums, which half precision may not hold."""
        weight, bias = self.norm.weight.to(y_BTD.dtype), self.norm.bias.to(y_BTD.dtype)
        return F.group_norm(y_BTD.flatten(0, 1), self.num_heads, weight, bias, self.norm.eps).view_as(y_BTD)

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return empty sums, (B, H, E, E)."""
        if self.role == "bidirectional":
            return None
        H, E = self.num_heads, self.dim // self.num_heads
        return empty_state(like, batch_size, sums=(H, E, E))

    def mixing_flops(self, length: int) -> float:
        """Pairs of columns within a chunk, and the matrix of each head written and read."""
        return flops(self.role, length, self.dim, self.dim, self.num_heads)


def features(x: Tensor) -> Tensor:
    """Return elu(x) + 1, written so that large negative numbers are not rounded to zero; float16 becomes float32."""
    x = x.float() if x.dtype == torch.float16 else x
    return x.clamp(max=0).exp() + x.relu()
