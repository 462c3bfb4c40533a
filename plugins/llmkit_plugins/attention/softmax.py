"""Softmax attention with one head, several heads, or several heads that share keys and values.

Here K is the number of key/value heads and C the number of columns a decoding state has room for.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.ops.elementwise import rms_norm
from llmkit.sequence import Memory, Sequence, State

GROWTH = 16
"""A decoding cache grows by at least so many columns; one for no more has its room from the start."""

Kept = dict[str, Tensor]
"""What a variant keeps of each position that is looked at, (B, ..., S, width): keys and values, or what makes them."""


class Cache(State):
    """A decoding state that takes up to ``room`` columns; its tensors have room for those seen, and often some more.

    Args:
        room: most columns.
        entries: the tensors.
    """

    def __init__(self, room: int, entries: dict[str, Tensor]) -> None:
        super().__init__(entries)
        self.room = room


class Softmax(Attention):
    """What softmax variants have in common: masks, position biases, the decoding cache, reading a memory.

    A variant says what its queries are, what is kept of each position and how the one looks at the other. What is
    kept is also what the cache holds. The projection back to the width must be called ``out``.

    Args:
        dim: model width.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when ``dropout`` is not a probability below one.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})
    grows: ClassVar[bool] = True  # whether the cache gets its room as it is needed, rather than at once
    out: nn.Linear

    def __init__(self, dim: int, role: Role, num_heads: int, dropout: float) -> None:
        super().__init__(dim, role)
        if not 0 <= dropout < 1:
            raise UserError(f"attention dropout must be at least 0 and below 1, got {dropout}")
        self.num_heads = num_heads
        self.bias_heads = num_heads  # heads with a position bias of their own
        self.dropout = dropout

    @abstractmethod
    def _project(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Kept]:
        """Return the queries, (B, H, T, E), and what is kept of a sequence that looks at itself, both turned."""

    @abstractmethod
    def _query(self, x_BTD: Tensor) -> Tensor:
        """Return the queries of a cross-attention, (B, H, T, E)."""

    @abstractmethod
    def _keep(self, x_BSD: Tensor) -> Kept:
        """Return what a cross-attention keeps of the memory."""

    @abstractmethod
    def _attend(self, q_BHTE: Tensor, kept: Kept, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """Return the mixed values, (B, H, T, E); the mask is boolean or added to the scores."""

    @abstractmethod
    def _room(self, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of what is kept of so many columns, without the batch."""

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``.

        Raises:
            ValueError: when the state has no room for the columns, or a cross-attention gets no memory.
        """
        cross = self.role == "cross"
        y_BHTE = self._cross(x_BTD, seq, memory, state) if cross else self._self(x_BTD, seq, state)
        y: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return y

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of what is kept, (B, ..., C, width); a ``cross`` one is filled from the memory."""
        if self.role == "bidirectional":
            return None
        columns = 0 if self.grows and max_length > GROWTH else max_length
        room = self._room(columns) if self.role == "causal" else {}
        state = Cache(max_length, {name: like.new_zeros(batch_size, *shape) for name, shape in room.items()})
        state.of_memory = self.role == "cross"
        return state

    def _self(self, x_BTD: Tensor, seq: Sequence, state: State | None) -> Tensor:
        q_BHTE, new = self._project(x_BTD, seq)
        if state is not None:
            start = state.length
            self._store(state, new, seq)
            if start > 0:
                kept = {name: state[name].narrow(-2, 0, state.length) for name in new}
                return self._attend(q_BHTE, kept, self._cached_mask(state, seq, q_BHTE.dtype))
        return self._own(q_BHTE, new, seq)

    def _own(self, q_BHTE: Tensor, kept: Kept, seq: Sequence) -> Tensor:
        """Let a sequence look at itself."""
        return self._attend(q_BHTE, kept, *self._own_mask(seq, q_BHTE.dtype))

    def _cross(self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None) -> Tensor:
        q_BHTE = self._query(x_BTD)
        if state is not None:
            state.length += x_BTD.shape[1]
        if state:
            # The state's rows follow the beams; the memory that is passed along need not.
            kept, segments_BS = {name: state[name] for name in state if name != "segments"}, state.get("segments")
            if seq.segments_BT is None and segments_BS is None:
                return self._attend(q_BHTE, kept, None)
            columns = next(iter(kept.values())).shape[-2]
            key = Sequence(torch.arange(columns, device=x_BTD.device)[None], segments_BS)
        elif memory is not None:
            kept, key = self._keep(memory.x_BSD), memory.seq
            if state is not None:
                state.update(kept)
                if key.segments_BT is not None:
                    state["segments"] = key.segments_BT
        else:
            raise ValueError("cross-attention needs the memory of an encoder")
        return self._attend(q_BHTE, kept, seq.mask(key, causal=False))

    def _own_mask(self, seq: Sequence, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
        """Return the mask of a sequence that looks at itself, and whether plain causal order says it all."""
        memo_key = ("scores", self.bias_heads, self.role, dtype)
        if memo_key not in seq.memo:
            causal = self.role == "causal"
            plain = causal and seq.segments_BT is None and not self._biased(seq)
            seq.memo[memo_key] = (None, True) if plain else (self._mask(seq, seq, dtype), False)
        mask, is_causal = seq.memo[memo_key]
        return mask, is_causal

    def _mask(self, seq: Sequence, key: Sequence, dtype: torch.dtype) -> Tensor | None:
        """Return the boolean mask, or with a position bias what is added to the scores."""
        mask = self._visible(seq, key)
        bias = seq.bias(key, self.bias_heads)
        if bias is None:
            return mask
        bias = bias.to(dtype)
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))

    def _visible(self, seq: Sequence, key: Sequence) -> Tensor | None:
        """Return which keys each query may look at, or None for all of them."""
        return seq.mask(key, causal=self.role == "causal")

    def _cached_mask(self, state: State, seq: Sequence, dtype: torch.dtype) -> Tensor | None:
        """Return the mask of the newest columns against all cached ones; layers of one kind share it."""
        if seq.positions_BT.shape[1] == 1 and "segments" not in state and "positions" not in state:
            return None
        memo_key = ("cached", type(self), self.bias_heads, dtype)
        if memo_key not in seq.memo:
            end = state.length
            positions = state["positions"][:, :end] if "positions" in state else seq.positions_BT.new_zeros(1, end)
            segments = state["segments"][:, :end] if "segments" in state else None
            seq.memo[memo_key] = self._mask(seq, Sequence(positions, segments), dtype)
        mask: Tensor | None = seq.memo[memo_key]
        return mask

    def _biased(self, seq: Sequence) -> bool:
        first = Sequence(seq.positions_BT[:, :1], position=seq.position)
        return first.bias(first, self.bias_heads) is not None

    def _store(self, state: State, new: Kept, seq: Sequence) -> None:
        """Write new columns into the cache; segments only once padding was seen, positions only for a bias."""
        assert isinstance(state, Cache)
        start, added = state.length, seq.positions_BT.shape[1]
        end = start + added
        if end > state.room:
            raise ValueError(f"the decoding state has room for {state.room} columns, got {end}")
        sample = state[next(iter(new))]
        if end > sample.shape[-2]:
            self._widen(state, new, end)
        for name, value in new.items():
            state[name].narrow(-2, start, added).copy_(value)
        if seq.segments_BT is not None and "segments" not in state:
            state["segments"] = seq.positions_BT.new_ones(len(sample), state.room)
        if "segments" in state:
            state["segments"][:, start:end] = 1 if seq.segments_BT is None else seq.segments_BT
        if start == 0 and self._biased(seq):
            state["positions"] = seq.positions_BT.new_zeros(len(sample), state.room)
        if "positions" in state:
            state["positions"][:, start:end] = seq.positions_BT
        state.length = end

    def _widen(self, state: Cache, new: Kept, columns: int) -> None:
        """Make room for so many columns and half as many again, so that a growing cache is seldom copied."""
        wider = self._room(min(state.room, columns + max(GROWTH, columns // 2)))
        for name in new:
            old = state[name]
            state[name] = old.new_empty(len(old), *wider[name])
            state[name].narrow(-2, 0, state.length).copy_(old.narrow(-2, 0, state.length))


class GroupedQuery(Softmax):
    """Several query heads share one key/value head, which makes the decoding cache smaller; one is multi-query.

    Ainslie et al. 2023, arXiv:2305.13245; with ``num_kv_heads=1`` it is Shazeer 2019, arXiv:1911.02150. Normalised
    queries and keys: Henry et al. 2020, arXiv:2010.04245, here with RMS normalisation and one scale per channel of a
    head that all heads, queries and keys share.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; must divide ``num_heads``.
        qk_norm: whether each head's queries and keys are normalised, which keeps the scores bounded.
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when the heads do not divide the width or each other.
    """

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, role, num_heads, dropout)
        check_heads(dim, num_heads, num_kv_heads)
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = 2 * num_kv_heads * self.head_dim
        if role == "cross":
            self.q = nn.Linear(dim, dim, bias=bias)
            self.kv = nn.Linear(dim, kv_dim, bias=bias)
        else:
            self.qkv = nn.Linear(dim, dim + kv_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.qk_scale = nn.Parameter(torch.ones(self.head_dim)) if qk_norm else None

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * length * dim; half of it when causal, the average over the positions."""
        return 4.0 * length * self.dim * (0.5 if self.role == "causal" else 1.0)

    def _project(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Kept]:
        H, K = self.num_heads, self.num_kv_heads
        qk_BHTE, v_BKTE = self._heads(self.qkv(x_BTD)).split_with_sizes([H + K, K], 1)
        q_BHTE, k_BKTE = seq.rotate(self._norm(qk_BHTE)).split_with_sizes([H, K], 1)
        return q_BHTE, {"k": k_BKTE, "v": v_BKTE}

    def _query(self, x_BTD: Tensor) -> Tensor:
        return self._norm(self._heads(self.q(x_BTD)))

    def _keep(self, x_BSD: Tensor) -> Kept:
        k_BKSE, v_BKSE = self._heads(self.kv(x_BSD)).chunk(2, dim=1)
        return {"k": self._norm(k_BKSE), "v": v_BKSE}

    def _room(self, columns: int) -> dict[str, tuple[int, ...]]:
        shape = (self.num_kv_heads, columns, self.head_dim)
        return {"k": shape, "v": shape}

    def _attend(self, q_BHTE: Tensor, kept: Kept, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHTE,
            kept["k"],
            kept["v"],
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def _heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, -1, self.head_dim).transpose(1, 2)

    def _norm(self, x_BHTE: Tensor) -> Tensor:
        if self.qk_scale is None:
            return x_BHTE
        return rms_norm(x_BHTE, self.qk_scale, 1e-6)


class MultiHead(GroupedQuery):
    """Several heads, each with its own queries, keys and values (the usual choice).

    Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads.
        qk_norm: whether each head's queries and keys are normalised (arXiv:2010.04245).
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, role, num_heads, num_heads, qk_norm, bias, dropout)


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


def check_heads(dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise UserError when ``num_heads`` does not divide ``dim`` or ``num_kv_heads`` does not divide ``num_heads``."""
    if num_heads < 1 or num_kv_heads < 1:
        raise UserError(f"num_heads and num_kv_heads must be at least 1, got {num_heads} and {num_kv_heads}")
    if dim % num_heads:
        raise UserError(
            f"dim {dim} is not divisible by num_heads {num_heads}; nearest widths: {nearest(dim, num_heads)}"
        )
    if num_heads % num_kv_heads:
        allowed = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise UserError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}; allowed: {allowed}")


def nearest(dim: int, step: int) -> str:
    """Return the widths around ``dim`` that ``step`` divides, as a list to read."""
    below = dim // step * step
    return ", ".join(str(width) for width in (below, below + step) if width)
