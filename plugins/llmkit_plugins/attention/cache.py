"""What the queries of a layer look at: keys and values, those of earlier calls included, and the mask.

The pieces that every softmax variant is put together from. ``Lookup`` answers "what do these queries look at?" for
training and decoding, self- and cross-attention; ``Cache`` is the decoding state that it fills. They know nothing
about heads or projections: whatever a variant stores of a column (keys and values, a latent) has the columns as its
second last dimension, (B, ..., S, width), and comes back in the order in which it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkit.contracts import Role
from llmkit.sequence import Memory, Sequence, State

GROWTH = 16
"""A decoding cache grows by at least this many columns; one with no more capacity is allocated whole."""

Seen = tuple[tuple[Tensor, ...], Tensor | None, bool]
"""Columns to look at, the mask (boolean, or added to the scores, or None) and whether to apply plain causal order."""


class Cache(State):
    """A decoding state of up to ``capacity`` columns that allocates memory as they come.

    ``Cache(2, 512, x, k=(4, 32), v=(4, 32))`` stores keys and values of 4 heads, (2, 4, S, 32) each.

    Args:
        batch_size: number of rows.
        capacity: most columns.
        like: gives the dtype and the device.
        widths: the shape of one column of each entry, without batch and columns.
    """

    def __init__(self, batch_size: int, capacity: int, like: Tensor, **widths: tuple[int, ...]) -> None:
        super().__init__(zeros(batch_size, 0 if capacity > GROWTH else capacity, like, widths))
        self.capacity = capacity

    def extend(
        self, seq: Sequence, new: dict[str, Tensor], biased: bool
    ) -> tuple[tuple[Tensor, ...], Sequence | None]:
        """Append the columns of ``seq``; return all columns so far, and their positions and segments.

        The latter are None when a single column may look at all of them. Segments are stored from the first padding
        on, positions only where the scores are ``biased`` by them.

        Raises:
            ValueError: when the columns exceed the capacity.
        """
        start, end = self.length, self.length + seq.positions_BT.shape[1]
        if end > self.capacity:
            raise ValueError(f"the decoding state has room for {self.capacity} columns, got {end}")
        sample = self[next(iter(new))]
        if end > sample.shape[-2]:
            self._grow(new, end)
        for name, value in new.items():
            self[name].narrow(-2, start, end - start).copy_(value)
        if seq.segments_BT is not None and "segments" not in self:
            self["segments"] = seq.positions_BT.new_ones(len(sample), self.capacity)
        if biased and start == 0:
            self["positions"] = seq.positions_BT.new_zeros(len(sample), self.capacity)
        if "segments" in self:
            self["segments"][:, start:end] = 1 if seq.segments_BT is None else seq.segments_BT
        if "positions" in self:
            self["positions"][:, start:end] = seq.positions_BT
        self.length = end

        columns = tuple(self[name].narrow(-2, 0, end) for name in new)
        segments_BS = self["segments"][:, :end] if "segments" in self else None
        if "positions" in self:
            return columns, Sequence(self["positions"][:, :end], segments_BS)
        if segments_BS is None and end - start == 1:
            return columns, None
        return columns, Sequence(seq.positions_BT.new_zeros(1, end), segments_BS)  # nothing reads the positions

    def _grow(self, names: dict[str, Tensor], columns: int) -> None:
        """Make room for half as many columns again, so that a long text is copied a few times, not at every step."""
        columns = min(self.capacity, columns + max(GROWTH, columns // 2))
        for name in names:
            old = self[name]
            self[name] = old.new_empty(*old.shape[:-2], columns, old.shape[-1])
            self[name].narrow(-2, 0, self.length).copy_(old.narrow(-2, 0, self.length))


class Lookup:
    """What the queries of one layer look at. Holds no tensors: masks are shared by the layers through ``seq.memo``.

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
            q_BHTE: the queries.
            seq: the sequence.
            state: when decoding, the layer's cache; ``new`` is appended to it.
            new: what is looked at of each column of ``seq``, under its name in the cache.
        """
        if state is None:
            return tuple(new.values()), *self.mask(q_BHTE.dtype, seq)
        assert isinstance(state, Cache)
        first = state.length == 0
        columns, key = state.extend(seq, new, biased=first and self._biased(seq))
        if first:  # a prompt looks at itself, as in training
            return tuple(new.values()), *self.mask(q_BHTE.dtype, seq)
        return columns, *((None, False) if key is None else self.mask(q_BHTE.dtype, seq, key))

    def memory(
        self, seq: Sequence, memory: Memory | None, state: State | None, project: Callable[[Memory], dict[str, Tensor]]
    ) -> Seen:
        """Return what a sequence looks at in an encoder's memory: what ``project`` makes of it, see ``from_memory``."""
        stored = bool(state)
        entries = from_memory(memory, state, seq, lambda memory: project(memory) | _segments(memory))
        segments_BS = entries.get("segments")
        columns = tuple(value for name, value in entries.items() if name != "segments")
        if seq.segments_BT is None and segments_BS is None:
            return columns, None, False
        if memory is not None and not stored:
            key = memory.seq  # all layers share the mask
        else:
            key = Sequence(seq.positions_BT.new_zeros(1, columns[0].shape[-2]), segments_BS)
        return columns, seq.mask(key, causal=False), False

    def mask(self, dtype: torch.dtype, seq: Sequence, key: Sequence | None = None) -> tuple[Tensor | None, bool]:
        """Return the mask and whether it is plain causal order, which needs none. Without ``key``: of ``seq`` itself.

        A boolean mask says who is seen, (B or 1, 1, T, S); with a position bias it is the bias, minus infinity where
        nothing is seen, (B or 1, H, T, S) in ``dtype``.
        """
        window = self.window
        if window is not None and key is None and seq.positions_BT.shape[1] <= window:
            window = None  # all of the row is near: the mask of layers without a window
        memo_key = ("scores", key is None, self.causal, self.num_heads, window, dtype)
        if memo_key not in seq.memo:
            if self.causal and key is None and seq.segments_BT is None and window is None and not self._biased(seq):
                seq.memo[memo_key] = None, True
            else:
                seq.memo[memo_key] = self._mask(dtype, seq, seq if key is None else key, window), False
        mask, is_causal = seq.memo[memo_key]
        return mask, is_causal

    def _mask(self, dtype: torch.dtype, seq: Sequence, key: Sequence, window: int | None) -> Tensor | None:
        mask = seq.mask(key, causal=self.causal)
        if window is not None:
            near = (seq.positions_BT[:, None, :, None] - key.positions_BT[:, None, None, :]).abs() < window
            mask = near if mask is None else near & mask
        bias = seq.bias(key, self.num_heads)
        if bias is None:
            return mask
        bias = bias.to(dtype)
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))

    def _biased(self, seq: Sequence) -> bool:
        first = Sequence(seq.positions_BT[:, :1], position=seq.position)
        return first.bias(first, self.num_heads) is not None


def from_memory(
    memory: Memory | None, state: State | None, seq: Sequence, project: Callable[[Memory], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what ``project`` makes of a memory; when decoding, of the first call's, and the state keeps it.

    Args:
        memory: the encoder's output.
        state: when decoding, a ``State`` that began empty.
        seq: the queries, which count as seen.
        project: gives the entries to look at, by name; the first dimension is the batch.

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


def zeros(batch_size: int, columns: int, like: Tensor, widths: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return zeros (B, ..., columns, width) for each column shape (..., width)."""
    return {name: like.new_zeros(batch_size, *outer, columns, width) for name, (*outer, width) in widths.items()}


def _segments(memory: Memory) -> dict[str, Tensor]:
    return {} if memory.seq.segments_BT is None else {"segments": memory.seq.segments_BT}
