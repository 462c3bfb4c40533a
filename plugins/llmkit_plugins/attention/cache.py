"""What the queries of a layer look at: keys and values, those of earlier calls included, and the mask.

Every softmax variant is composed of these pieces. ``Lookup`` answers "what do these queries look at?" in
training and decoding, in self- and cross-attention; ``Cache`` is the decoding state that it fills. Neither knows of
heads or projections: what a variant keeps of a column (keys and values, a latent) is any tensor whose second last
dimension is the columns, (B, ..., S, width), and comes back in the order in which it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.contracts import Role
from llmkit.sequence import Memory, Sequence, State

GROWTH = 16
"""A cache grows by at least this many columns; one with no more capacity is allocated whole."""

Seen = tuple[tuple[Tensor, ...], Tensor | None, bool]
"""The columns; the mask, boolean or added to the scores; whether plain causal order holds, which needs no mask."""


class Cache(State):
    """A decoding state of up to ``capacity`` columns that allocates memory as they come, until it is settled.

    ``Cache(2, 512, x, k=(4, 32), v=(4, 32))`` stores keys and values of 4 heads, (2, 4, S, 32) each. Settled, it holds
    all its columns, and those to come count as padding; how many there are is an entry, ``columns``, (B,).

    Args:
        batch_size: number of rows.
        capacity: most columns.
        like: gives the dtype and the device.
        widths: the shape of one column of each entry, without batch and columns.
    """

    grows: ClassVar[bool] = True

    def __init__(self, batch_size: int, capacity: int, like: Tensor, **widths: tuple[int, ...]) -> None:
        columns = 0 if self.grows and capacity > GROWTH else capacity
        for name, (*outer, width) in widths.items():
            self[name] = like.new_zeros(batch_size, *outer, columns, width)
        self.capacity = capacity
        self.settled = False

    def extend(self, seq: Sequence, new: dict[str, Tensor], biased: bool) -> tuple[tuple[Tensor, ...], Sequence | None]:
        """Append the columns of ``seq``; return all columns so far, and their positions and segments.

        The latter are None when one new column may look at all of them. Segments are stored from the first padding on,
        positions only when the first call says that the scores are ``biased`` by them.

        Raises:
            ValueError: when the columns exceed the capacity.
        """
        if self.settled:
            return self._put(seq, new)
        start, end = self.length, self.length + seq.positions_BT.shape[1]
        if end > self.capacity:
            raise ValueError(f"the decoding state has room for {self.capacity} columns, got {end}")
        for name, value in new.items():
            if end > self[name].shape[-2]:
                self._grow(name, end)
            self[name].narrow(-2, start, end - start).copy_(value)
        if biased or "positions" in self:
            self._append("positions", seq.positions_BT)
        if seq.segments_BT is not None or "segments" in self:
            self._append("segments", segments_or_ones(seq))
        self.length = end

        columns = tuple(self[name].narrow(-2, 0, end) for name in new)
        if end - start == 1 and "positions" not in self and "segments" not in self:
            return columns, None
        # Without a bias nothing reads the positions, only how many there are.
        positions_BS = self["positions"] if "positions" in self else seq.positions_BT.new_zeros(1, end)
        return columns, Sequence(positions_BS, self.get("segments"))

    def settle(self) -> None:
        """Take all the room now: from here on there are single columns, and no more than that."""
        if self.settled:
            return
        self.settled, room = True, self.capacity - self.length
        rows = len(next(iter(self.values())))
        marks = {name: self.pop(name) for name in ("positions", "segments") if name in self}
        for name in self:
            self._grow(name, self.capacity)
            self[name].narrow(-2, self.length, room).zero_()
        some = next(iter(self.values()))
        past_BS = marks.setdefault("segments", some.new_ones(rows, self.length, dtype=torch.long))
        self.update({name: F.pad(numbers_BS, (0, room)) for name, numbers_BS in marks.items()})
        self["columns"] = past_BS.new_full((rows,), self.length)

    def _put(self, seq: Sequence, new: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Sequence]:
        """Do what ``extend`` does for one column, at a place that only the device knows."""
        place_1, segments_bT = self["columns"][:1], segments_or_ones(seq)
        for name, value in new.items():
            self[name].index_copy_(-2, place_1, value.to(self[name].dtype))
        for name, numbers_bT in {"positions": seq.positions_BT, "segments": segments_bT}.items():
            if name in self:
                self[name].index_copy_(1, place_1, numbers_bT.expand(len(self[name]), -1))
        self["columns"] += 1
        self.length += 1
        positions_BS = self["positions"] if "positions" in self else self["segments"]  # which nothing reads
        return tuple(self[name] for name in new), Sequence(positions_BS, self["segments"])

    def _append(self, name: str, numbers_bT: Tensor) -> None:
        """Append one number a column to those of a name; columns from before the first ones get 1."""
        batch_size = len(next(iter(self.values())))
        past_BS = self[name] if name in self else numbers_bT.new_ones(batch_size, self.length)
        self[name] = torch.cat([past_BS, numbers_bT.expand(batch_size, -1)], 1)

    def _grow(self, name: str, columns: int) -> None:
        """Make room for half as many columns again, so that a long text is copied a few times, not at every step."""
        old, columns = self[name], min(self.capacity, columns + max(GROWTH, columns // 2))
        self[name] = old.new_empty(*old.shape[:-2], columns, old.shape[-1])
        self[name].narrow(-2, 0, self.length).copy_(old.narrow(-2, 0, self.length))


class Lookup:
    """What the queries of one layer look at. It holds no tensors; layers of one kind share masks by ``seq.memo``.

    Args:
        role: of the layer.
        num_heads: heads with a position bias of their own.
        window: how many positions of a document are seen, the query's own included; None: all.
    """

    def __init__(self, role: Role, num_heads: int, window: int | None = None) -> None:
        self.causal, self.num_heads, self.window = role == "causal", num_heads, window

    def __call__(self, q_BHTE: Tensor, seq: Sequence, state: State | None, **new: Tensor) -> Seen:
        """Return what a sequence looks at: itself, and before it the columns that a decoding state holds.

        Args:
            q_BHTE: the queries; a position bias gets their dtype.
            seq: the sequence.
            state: when decoding, the layer's ``Cache``; ``new`` is appended to it.
            new: what is looked at of each column of ``seq``, under its name in the cache.
        """
        if state is not None:
            assert isinstance(state, Cache)
            first = state.length == 0
            columns, key = state.extend(seq, new, biased=first and self._biased(seq))
            if not first:
                return columns, *((None, False) if key is None else self._mask(q_BHTE.dtype, seq, key))
            # The first call looks at itself alone, as in training.
        return tuple(new.values()), *self._mask(q_BHTE.dtype, seq, None)

    def memory(
        self, seq: Sequence, memory: Memory | None, state: State | None, project: Callable[[Memory], dict[str, Tensor]]
    ) -> Seen:
        """Return what a sequence looks at in an encoder's memory; arguments as in ``from_memory``."""

        def with_segments(memory: Memory) -> dict[str, Tensor]:
            segments_BS = memory.seq.segments_BT
            return project(memory) if segments_BS is None else {**project(memory), "segments": segments_BS}

        stored = bool(state)
        entries = from_memory(seq, memory, state, with_segments)
        segments_BS, columns = entries.get("segments"), tuple(entries.values())
        if segments_BS is not None:
            columns = columns[:-1]
        elif seq.segments_BT is None:
            return columns, None, False
        if stored or memory is None:
            key = Sequence(seq.positions_BT.new_zeros(1, columns[0].shape[-2]), segments_BS)
        else:
            key = memory.seq  # for which all layers share one mask
        return columns, seq.mask(key, causal=False), False

    def _mask(self, dtype: torch.dtype, seq: Sequence, key: Sequence | None) -> tuple[Tensor | None, bool]:
        """Return the mask and whether it is plain causal order. Without ``key`` the sequence looks at itself."""
        window = self.window
        if key is None and window is not None and seq.positions_BT.shape[1] <= window:
            window = None  # all of the row is near: the mask of layers without a window
        memo_key = ("scores", key is None, self.causal, self.num_heads, window, dtype)
        if memo_key not in seq.memo:
            plain = key is None and self.causal and window is None and seq.segments_BT is None
            if plain and not self._biased(seq):
                seq.memo[memo_key] = None, True
            else:
                seq.memo[memo_key] = self._scores(dtype, seq, seq if key is None else key, window), False
        mask, is_causal = seq.memo[memo_key]
        return mask, is_causal

    def _scores(self, dtype: torch.dtype, seq: Sequence, key: Sequence, window: int | None) -> Tensor | None:
        """Return who sees whom, (B or 1, 1, T, S); with a position bias that, and minus infinity for what is hidden."""
        mask = seq.mask(key, causal=self.causal)
        if window is not None:
            near = (seq.positions_BT[:, None, :, None] - key.positions_BT[:, None, None, :]).abs() < window
            mask = near if mask is None else near & mask
        bias_BHTS = seq.bias(key, self.num_heads)
        if bias_BHTS is None:
            return mask
        bias_BHTS = bias_BHTS.to(dtype)
        return bias_BHTS if mask is None else bias_BHTS.masked_fill(~mask, float("-inf"))

    def _biased(self, seq: Sequence) -> bool:
        first = Sequence(seq.positions_BT[:, :1], position=seq.position)
        return first.bias(first, self.num_heads) is not None


def from_memory(
    seq: Sequence, memory: Memory | None, state: State | None, project: Callable[[Memory], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what ``project`` makes of a memory; when decoding, only the first call does, and the state keeps it.

    Args:
        seq: the queries, which the state counts.
        memory: the encoder's output.
        state: when decoding, a ``State`` that began empty.
        project: returns what is looked at, by name; the first dimension is the batch.

    Raises:
        ValueError: when there is neither a memory nor a state that holds one.
    """
    if state is not None:
        state.length += seq.positions_BT.shape[1]
        if state:
            # The state's rows follow the beams; the memory that is passed along need not.
            return state
    if memory is None:
        raise ValueError("cross-attention needs the memory of an encoder")
    entries = project(memory)
    if state is not None:
        state.update(entries)
        state.of_memory = True
    return entries


def segments_or_ones(seq: Sequence) -> Tensor:
    """Return the segments, or ones where there is one document and no padding."""
    return torch.ones_like(seq.positions_BT) if seq.segments_BT is None else seq.segments_BT
