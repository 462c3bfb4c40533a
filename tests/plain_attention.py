"""Textbook multi-head attention with an explicit mask: it has every property, and ``bugs`` injects its bugs into it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Mixing, Sequence, State


class PlainAttention(Attention):
    """softmax(Q K^T / sqrt(E)) V over several heads; Vaswani et al. 2017, arXiv:1706.03762."""

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(self, dim: int, role: Role, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(dim, role)
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.rand(1) + 1)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D)."""
        source, key = (x_BTD, seq) if memory is None else (memory.x_BSD, memory.seq)
        q, k, v = self.heads(self.q(x_BTD)), self.heads(self.k(source)), self.heads(self.v(source))
        segments = self.segments(key, source)
        positions = key.positions_BT.expand(len(source), -1)
        if memory is None:
            q, k = seq.rotate(q), seq.rotate(k)
        if state is not None:
            k, v = self.remember(state, "k", k, 2), self.remember(state, "v", v, 2)
            segments, positions = self.remember(state, "s", segments, 1), self.remember(state, "p", positions, 1)
            state.length += x_BTD.shape[1]

        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) * self.temperature
        bias = None if memory is not None else seq.bias(Sequence(positions, segments), self.num_heads)
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        seen = self.seen(seq, x_BTD, segments)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        y = weights @ v
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the weights of the softmax."""
        looked_at, key = (x_BTD, seq) if memory is None else (memory.x_BSD, memory.seq)
        q, k, values = self.heads(self.q(x_BTD)), self.heads(self.k(looked_at)), self.heads(self.v(looked_at))
        bias = None
        if memory is None:
            q, k, bias = seq.rotate(q), seq.rotate(k), seq.bias(key, self.num_heads)
        looked = q @ k.mT * self.temperature / math.sqrt(self.dim // self.num_heads)
        looked = looked if bias is None else looked + bias
        hidden = ~self.seen(seq, x_BTD, self.segments(key, looked_at))
        shares = looked.masked_fill(hidden, -1e30).softmax(-1)
        return Mixing(values, shares, lambda y: self.out(y.transpose(1, 2).flatten(-2)))

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty state; keys, values and where they stand are appended to it."""
        return None if self.role == "bidirectional" else State()

    def heads(self, x_BTD: Tensor) -> Tensor:
        """Return (B, H, T, E)."""
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, self.num_heads, -1).transpose(1, 2)

    def segments(self, seq: Sequence, x: Tensor) -> Tensor:
        """Return the segments, (B, T), 1 where there are none."""
        ones = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        return ones if seq.segments_BT is None else seq.segments_BT

    def remember(self, state: State, name: str, new: Tensor, dim: int) -> Tensor:
        """Append to the state; a memory is kept as it came first."""
        if self.role != "cross" or name not in state:
            state[name] = torch.cat([state[name], new], dim) if name in state else new
        return state[name]

    def seen(self, seq: Sequence, x_BTD: Tensor, key_BS: Tensor) -> Tensor:
        """Return which keys each query may look at, (B, 1, T, S)."""
        query_BT = self.segments(seq, x_BTD)
        T, S = query_BT.shape[1], key_BS.shape[1]
        if self.role == "cross":
            return (key_BS > 0)[:, None, None, :].expand(-1, 1, T, -1)
        seen = query_BT[:, None, :, None] == key_BS[:, None, None, :]
        if self.role == "causal":
            rows, columns = torch.arange(T, device=x_BTD.device), torch.arange(S, device=x_BTD.device)
            seen = seen & (columns[None] <= rows[:, None] + S - T)
        return seen


def reference(module: PlainAttention, x: Tensor, seq: Sequence, memory: Memory | None) -> Tensor:
    """Compute it score by score, position by position."""
    source, key = (x, seq) if memory is None else (memory.x_BSD, memory.seq)
    H, E = module.num_heads, module.dim // module.num_heads
    q, k, v = module.q(x), module.k(source), module.v(source)
    bias = None if memory is not None else seq.bias(key, H)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        segments = [1] * x.shape[1] if seq.segments_BT is None else seq.segments_BT[b].tolist()
        keys = [1] * source.shape[1] if key.segments_BT is None else key.segments_BT[b].tolist()
        for t, segment in enumerate(segments):
            seen = [s for s, other in enumerate(keys) if other == (1 if memory is not None else segment)]
            if module.role == "causal":
                seen = [s for s in seen if s <= t]
            mixed = []
            for h in range(H):
                part = slice(h * E, (h + 1) * E)
                scores = []
                for s in seen:
                    left, right = q[b, t, part], k[b, s, part]
                    if memory is None:
                        left, right = turned(left, seq, b, t), turned(right, seq, b, s)
                    score = float(left @ right) / math.sqrt(E) * float(module.temperature)
                    if bias is not None:
                        score += float(bias[b if len(bias) > 1 else 0, h, t, s])
                    scores.append(math.exp(score))
                mixed.append(sum(w / sum(scores) * v[b, s, part] for w, s in zip(scores, seen, strict=True)))
            if seen:
                out[b, t] = module.out(torch.cat([torch.as_tensor(value) for value in mixed]))
    return out


def turned(vector: Tensor, seq: Sequence, row: int, column: int) -> Tensor:
    """Return one query or key turned by its position."""
    place = seq.positions_BT[row if len(seq.positions_BT) > 1 else 0, column]
    return Sequence(place[None, None], None, seq.position).rotate(vector[None, None, None])[0, 0, 0]
