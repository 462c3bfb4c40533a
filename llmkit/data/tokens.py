"""Tokens of a split as one flat array on disk, and the blocks that are cut from it."""

from __future__ import annotations

import json
import os
import weakref
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.contracts import IGNORE, Batch, Tokenizer

Index = NDArray[np.int64]


class Piece(NamedTuple):
    """Tokens of a document, or of a chunk of one, and the bytes of text they stand for."""

    ids: list[int]
    num_bytes: int
    document: int


def joined(pieces: Iterable[Piece], tokenizer: Tokenizer, pack: bool) -> Iterator[tuple[list[int], int, bool]]:
    """Yield ids to be joined, their bytes, and whether a document begins with them.

    Every document is followed by ``eos``, except one that is alone; with ``pack`` it begins with ``bos`` too, and
    always ends with ``eos``. Documents without tokens are left out.
    """
    document, count = -1, 0
    for piece in pieces:
        if not piece.ids:
            continue
        begins = piece.document != document or count == 0
        if begins:
            if count:
                yield [tokenizer.eos_id], 0, False
            document, count = piece.document, count + 1
        yield [tokenizer.bos_id, *piece.ids] if pack and begins else piece.ids, piece.num_bytes, begins
    if count and (pack or count > 1):
        yield [tokenizer.eos_id], 0, False


@dataclass(frozen=True)
class Tokens:
    """The token array of a split."""

    data: Path | NDArray[Any]
    dtype: str
    size: int
    num_bytes: float
    starts: Index | None = None
    """Where each packed document begins, and the end of the last one."""

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted: all but the first, of the stream or of each packed document."""
        return max(0, self.size - 1 if self.starts is None else self.size - len(self.starts) + 1)


def write_tokens(folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, pack: bool) -> None:
    """Write the token array of a split."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    size = num_bytes = 0
    starts: list[int] = []
    with open(folder / "tokens.bin", "wb") as file:
        for ids, count, begins in joined(pieces, tokenizer, pack):
            if begins:
                starts.append(size)
            file.write(np.asarray(ids, dtype).tobytes())  # unlike tofile it says that the disk is full
            size += len(ids)
            num_bytes += count
    if pack:
        np.save(folder / "starts.npy", np.array([*starts, size], np.int64))
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype.name, "size": size, "num_bytes": num_bytes}))


def read_tokens(folder: Path) -> Tokens:
    """Return what ``write_tokens`` wrote; the array itself stays on disk."""
    starts = folder / "starts.npy"
    meta = json.loads((folder / "meta.json").read_text())
    return Tokens(folder / "tokens.bin", **meta, starts=np.load(starts) if starts.exists() else None)


class Order(Sequence[Index]):
    """The batches of an epoch, which are cut when they are asked for: what is kept is four bytes a row.

    Args:
        rng: shuffles the rows.
        rows: how many there are.
        batch_size: rows of a batch; the last one may be smaller.
        offset: the index of the first row.
        step: how far the indices of two rows are apart.
    """

    def __init__(self, rng: np.random.Generator, rows: int, batch_size: int, offset: int = 0, step: int = 1) -> None:
        self._rows = rng.permutation(np.arange(rows, dtype=np.uint32 if rows <= 2**32 else np.int64))
        self._batch_size, self._offset, self._step = batch_size, offset, step

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, number: Any) -> Any:
        """Return a batch, by its number from 0."""
        if not 0 <= number < len(self):
            raise IndexError(f"no batch {number} of {len(self)}")
        rows = self._rows[number * self._batch_size : (number + 1) * self._batch_size]
        return self._offset + self._step * rows.astype(np.int64)


class Blocks:
    """Blocks of ``context`` tokens cut from the stream of a split, with the next token as target.

    Training order: every epoch has its own offset of the first block, so that blocks are not cut at the same places
    again, and its own order. What is before the offset and too little for a block after the last one, less than two
    contexts of tokens together, is read in other epochs. Evaluation: blocks from the first token on, each target
    exactly once.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, pad_id: int) -> None:
        self.source, self.context, self.batch_size, self.pad_id = tokens, context, batch_size, pad_id
        self.size = tokens.size
        # Room for any offset below the context, where the stream is long enough.
        self.training_rows = max(1, (self.size - context) // context)

    def __len__(self) -> int:
        """Number of targets: none means that there is nothing to train on."""
        return self.source.targets

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("tokens", "_file")}

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """The token array, mapped from its file."""
        data = self.source.data
        return np.asarray(np.memmap(data, self.source.dtype, "r")) if isinstance(data, Path) else data

    @cached_property
    def _file(self) -> int | None:
        """The opened token file; None where the tokens are in memory, or the system (Windows) cannot read like that."""
        if not isinstance(self.source.data, Path) or not hasattr(os, "pread"):
            return None
        file = os.open(self.source.data, os.O_RDONLY)
        weakref.finalize(self, os.close, file)
        return file

    def _spans(self, starts: Index, lengths: Index) -> NDArray[Any]:
        """Return the tokens of spans, one after the other.

        They are read, not taken from the mapped array: all that was ever read of that counts as this process's memory.
        """
        if self._file is None:
            return np.asarray(self.tokens[_ranges(starts, lengths)])
        dtype = np.dtype(self.source.dtype)
        spans = zip((starts * dtype.itemsize).tolist(), (lengths * dtype.itemsize).tolist(), strict=True)
        return np.frombuffer(b"".join([os.pread(self._file, size, start) for start, size in spans]), dtype)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each target."""
        return self.source.num_bytes / max(len(self), 1)

    @property
    def num_batches(self) -> int:
        """Number of training batches of an epoch."""
        return -(-self.training_rows // self.batch_size)

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the batches of an epoch; the last one may be smaller."""
        room = self.size - 1 - self.training_rows * self.context
        offset = int(rng.integers(room + 1)) if room > 0 else 0
        return Order(rng, self.training_rows, self.batch_size, offset, self.context)

    def evaluation_order(self) -> Sequence[Index]:
        """Return batches that hold every target once, in the order of the text."""
        return split_batches(np.arange(0, max(self.size - 1, 1), self.context), self.batch_size)

    def __getitem__(self, starts: Index) -> Batch:
        """Return the blocks that begin at these tokens as one finished batch."""
        width = self.context + 1
        last = self.size - 1
        if int(starts.max()) + self.context <= last:
            ids_BU = self._spans(starts, np.full_like(starts, width)).reshape(-1, width).astype(np.int64)
            ids_BT, targets_BT, count = ids_BU[:, :-1], ids_BU[:, 1:], starts.size * self.context
        else:
            index_BU = starts[:, None] + np.arange(width)  # U: the context and one more
            ids_BU = self.tokens[np.minimum(index_BU, last)].astype(np.int64)
            targets_BT = np.where(index_BU[:, 1:] > last, IGNORE, ids_BU[:, 1:])
            ids_BT = np.where(index_BU[:, :-1] > last, self.pad_id, ids_BU[:, :-1])
            count = int((targets_BT != IGNORE).sum())
        return {
            "ids": torch.from_numpy(np.ascontiguousarray(ids_BT)),
            "targets": torch.from_numpy(np.ascontiguousarray(targets_BT)),
            "bytes": torch.tensor(count * self.bytes_per_token, dtype=torch.float32),
        }


class Packed(Blocks):
    """Whole documents packed into rows of ``context`` tokens; none sees another.

    A document ``bos, tokens, eos`` gives one target for each token but the first. One with more targets than the
    context is split into pieces of ``context`` positions, the last one shorter; the later pieces begin without
    ``bos`` and without the text before them. Pieces are placed into rows best fit first, once for all epochs (they
    do not see each other, so their company does not matter); an epoch is a new order of the rows.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, pad_id: int) -> None:
        super().__init__(tokens, context, batch_size, pad_id)
        assert tokens.starts is not None
        bounds = tokens.starts
        targets = np.diff(bounds) - 1
        pieces = -(-targets // context)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, .. within a document
        start = np.repeat(bounds[:-1], pieces) + number * context
        length = np.minimum(np.repeat(targets, pieces) - number * context, context)
        row = best_fit(length, context)
        order = np.argsort(row, kind="stable")
        self._start, self._length = start[order], length[order]
        self.num_rows = int(row.max(initial=-1)) + 1
        self._first = np.searchsorted(row[order], np.arange(self.num_rows + 1))  # where the pieces of each row begin
        self.training_rows = self.num_rows

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the rows of an epoch, in batches."""
        return Order(rng, self.num_rows, self.batch_size)

    def evaluation_order(self) -> Sequence[Index]:
        """Return all rows in batches."""
        return split_batches(np.arange(self.num_rows), self.batch_size)

    def __getitem__(self, rows: Index) -> Batch:
        """Return these rows as one finished batch, with ``segments``."""
        counts = self._first[rows + 1] - self._first[rows]
        piece = _ranges(self._first[rows], counts)
        row = np.repeat(np.arange(rows.size), counts)
        segment = _ranges(np.ones_like(counts), counts)
        length = self._length[piece]
        tokens = self._spans(self._start[piece], length + 1)
        source = _ranges(np.cumsum(length + 1) - length - 1, length)  # all but the last one of each piece
        # The pieces of a row stand one after the other: its first position plus what the earlier ones took.
        taken = np.cumsum(length) - length
        taken -= np.repeat(taken[np.cumsum(counts) - counts], counts)
        place = _ranges(row * self.context + taken, length)
        ids = np.full(rows.size * self.context, self.pad_id, np.int64)
        targets = np.full_like(ids, IGNORE)
        segments = np.zeros_like(ids)
        ids[place], targets[place] = tokens[source], tokens[source + 1]
        segments[place] = segment.repeat(length)
        shape = (rows.size, self.context)
        return {
            "ids": torch.from_numpy(ids.reshape(shape)),
            "targets": torch.from_numpy(targets.reshape(shape)),
            "segments": torch.from_numpy(segments.reshape(shape)),
            "bytes": torch.tensor(source.size * self.bytes_per_token, dtype=torch.float32),
        }


def best_fit(lengths: NDArray[Any], capacity: int, pool: int = 4096) -> Index:
    """Return the row of each item: longest first, into the fullest row that has room (pool by pool)."""
    rows = np.empty(len(lengths), np.int64)
    count = 0
    for begin in range(0, len(lengths), pool):
        part = lengths[begin : begin + pool]
        room: list[tuple[int, int]] = []  # (free positions, row), sorted
        for item in np.argsort(-part, kind="stable").tolist():
            length = int(part[item])
            at = bisect_left(room, (length, -1))
            if at < len(room):
                free, row = room.pop(at)
            else:
                free, row, count = capacity, count, count + 1
            rows[begin + item] = row
            if free > length:
                insort(room, (free - length, row))
    return rows


def _ranges(starts: NDArray[Any], counts: NDArray[Any]) -> Index:
    """Return start, start + 1, ... (count of them) of each pair, one after the other."""
    return np.asarray(np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()), np.int64)


def split_batches(items: Index, size: int) -> list[Index]:
    """Return the items in batches; the last one may be smaller."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
