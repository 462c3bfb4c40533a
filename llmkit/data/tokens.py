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
from torch import Tensor

from llmkit.contracts import IGNORE, Batch, Tokenizer

Index = NDArray[np.int64]


class Piece(NamedTuple):
    """Tokens of a document, or of a chunk of one, and the bytes of text they stand for."""

    ids: list[int]
    num_bytes: int
    document: int
    hidden: int = 0
    """How many of the bytes the unknown tokens stand for."""


class Ending(NamedTuple):
    """What the end of a document is, where documents are joined."""

    num_bytes: int = 0
    """Bytes of text that ``eos`` stands for: 1 for the newline of a line."""
    of_empty: bool = False
    """Whether documents without tokens count: they are ``eos`` alone."""


def joined(
    pieces: Iterable[Piece], tokenizer: Tokenizer, pack: bool, ending: Ending
) -> Iterator[tuple[list[int], int, bool]]:
    """Yield ids to be joined, their bytes, and whether a document begins with them.

    Every document is followed by ``eos``, unless it is the only one; with ``pack`` it also begins with ``bos``, and
    always ends with ``eos``. Documents without tokens are left out, unless ``ending`` says otherwise. Two
    documents ``a b`` and ``c`` become ``a b eos c eos``, with ``pack`` ``bos a b eos bos c eos``.
    """
    document, count = -1, 0
    for piece in pieces:
        begins = piece.document != document or count == 0
        if not piece.ids and not (begins and ending.of_empty):
            continue
        if begins:
            if count:
                yield [tokenizer.eos_id], ending.num_bytes, False
            document, count = piece.document, count + 1
        ids = [tokenizer.bos_id, *piece.ids] if pack and begins else piece.ids
        if ids:
            yield ids, piece.num_bytes, begins
    if count and (pack or count > 1):
        yield [tokenizer.eos_id], ending.num_bytes, False


@dataclass(frozen=True)
class Tokens:
    """The token array of a split, in memory or in a file."""

    data: Path | NDArray[Any]
    dtype: str
    size: int
    num_bytes: float  # of the text that the tokens stand for
    starts: Index | None = None  # where each packed document begins, and where the last one ends
    unk_id: int = -1
    hidden: float = 0.0  # bytes of text that an unknown token stands for, on average

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted: all but the first, of the stream or of each packed document."""
        return max(0, self.size - 1 if self.starts is None else self.size - len(self.starts) + 1)


def write_tokens(folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, pack: bool, ending: Ending) -> None:
    """Write the token array of a split."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    size = num_bytes = 0
    starts: list[int] = []
    unknown = hidden = 0

    def counted() -> Iterator[Piece]:
        nonlocal unknown, hidden
        for piece in pieces:
            unknown, hidden = unknown + piece.ids.count(tokenizer.unk_id), hidden + piece.hidden
            yield piece

    with open(folder / "tokens.bin", "wb") as file:
        for ids, count, begins in joined(counted(), tokenizer, pack, ending):
            if begins:
                starts.append(size)
            file.write(np.asarray(ids, dtype).tobytes())  # tofile would not report that the disk is full
            size += len(ids)
            num_bytes += count
    if pack:
        np.save(folder / "starts.npy", np.array([*starts, size], np.int64))
    meta = {"dtype": dtype.name, "size": size, "num_bytes": num_bytes}
    meta |= {"unk_id": tokenizer.unk_id, "hidden": hidden / max(unknown, 1)}
    (folder / "meta.json").write_text(json.dumps(meta))


def read_tokens(folder: Path) -> Tokens:
    """Return what ``write_tokens`` wrote; the array itself stays on disk."""
    starts = folder / "starts.npy"
    meta = json.loads((folder / "meta.json").read_text())
    return Tokens(folder / "tokens.bin", **meta, starts=np.load(starts) if starts.exists() else None)


class Order(Sequence[Index]):
    """The batches of an epoch, each cut on access; only the permutation is stored, four bytes a row.

    Args:
        rng: shuffles the rows.
        rows: number of rows.
        batch_size: rows of a batch; the last one may be smaller.
        offset: the index of the first row.
        step: distance of the indices of two rows.
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

    Training order: every epoch has its own offset of the first block, so that blocks are cut at other places, and its
    own order. The tokens before the offset and after the last block, together less than two contexts, are read in
    other epochs. Evaluation: blocks from the first token on, each target exactly once.

    13 tokens and a context of 4 give 2 training blocks, which begin at tokens 0 and 4, or 1 and 5, ... or 4 and 8
    (token 12 is the last target). Evaluation has blocks at 0, 4 and 8. A block of 4 reads 5 tokens: ids are the first
    4 of them, targets the last 4.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, pad_id: int) -> None:
        self.stored, self.context, self.batch_size, self.pad_id = tokens, context, batch_size, pad_id
        self.size = tokens.size
        # One block fewer than fit, so that every offset up to the context is possible.
        self.training_rows = max(1, (self.size - context) // context)

    def __len__(self) -> int:
        """Number of targets; 0: there is nothing to train on."""
        return self.stored.targets

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("tokens", "_file")}

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """The token array, mapped from its file."""
        data = self.stored.data
        return np.asarray(np.memmap(data, self.stored.dtype, "r")) if isinstance(data, Path) else data

    @cached_property
    def _file(self) -> int | None:
        """The open token file; None if the tokens are in memory, or the system (Windows) has no ``pread``."""
        if not isinstance(self.stored.data, Path) or not hasattr(os, "pread"):
            return None
        file = os.open(self.stored.data, os.O_RDONLY)
        weakref.finalize(self, os.close, file)
        return file

    def _spans(self, starts: Index, lengths: Index) -> NDArray[Any]:
        """Return the tokens of spans, one after the other.

        They are read from the file: pages touched in the mapped array would count as this process's memory.
        """
        if self._file is None:
            return np.asarray(self.tokens[_ranges(starts, lengths)])
        dtype = np.dtype(self.stored.dtype)
        spans = zip((starts * dtype.itemsize).tolist(), (lengths * dtype.itemsize).tolist(), strict=True)
        return np.frombuffer(b"".join([os.pread(self._file, size, start) for start, size in spans]), dtype)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each target."""
        return self.stored.num_bytes / max(len(self), 1)

    def hidden_bytes(self, targets: Tensor) -> float:
        """Return how many bytes of text the unknown tokens among these targets stand for."""
        return int((targets == self.stored.unk_id).sum()) * self.stored.hidden

    @property
    def num_batches(self) -> int:
        """Number of training batches of an epoch."""
        return -(-self.training_rows // self.batch_size)

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the batches of an epoch; the last one may be smaller."""
        spare = self.size - 1 - self.training_rows * self.context
        offset = int(rng.integers(spare + 1)) if spare > 0 else 0
        return Order(rng, self.training_rows, self.batch_size, offset, self.context)

    def evaluation_order(self) -> Sequence[Index]:
        """Return batches that hold every target once, in the order of the text."""
        return split_batches(np.arange(0, max(self.size - 1, 1), self.context), self.batch_size)

    def __getitem__(self, starts: Index) -> Batch:
        """Return the blocks that begin at these tokens as one finished batch."""
        width = self.context + 1
        last = self.size - 1
        # Padding is needed only for a block that reaches beyond the last token.
        if int(starts.max()) + self.context <= last:
            ids_BU = self._spans(starts, np.full_like(starts, width)).reshape(-1, width).astype(np.int64)
            ids_BT, targets_BT, count = ids_BU[:, :-1], ids_BU[:, 1:], starts.size * self.context
        else:
            index_BU = starts[:, None] + np.arange(width)  # U: the context and one more
            ids_BU = self.tokens[np.minimum(index_BU, last)].astype(np.int64)
            targets_BT = np.where(index_BU[:, 1:] > last, IGNORE, ids_BU[:, 1:])
            ids_BT = np.where(index_BU[:, :-1] > last, self.pad_id, ids_BU[:, :-1])
            count = int((targets_BT != IGNORE).sum())
        return self._batch(count, ids=ids_BT, targets=targets_BT)

    def _batch(self, count: int, **columns: NDArray[Any]) -> Batch:
        """Return a batch of these columns, with the bytes of text that its ``count`` targets stand for.

        ``hidden`` is how many of them unknown tokens stand for.
        """
        batch = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        # A plain number: a model in half precision gets every floating-point tensor of a batch rounded.
        return {**batch, "bytes": count * self.bytes_per_token, "hidden": self.hidden_bytes(batch["targets"])}


class Packed(Blocks):
    """Whole documents packed into rows of ``context`` tokens; none sees another.

    A document ``bos, tokens, eos`` gives one target for each token but the first. One with more targets than the
    context is split into pieces of ``context`` positions, the last one shorter; the later pieces begin without
    ``bos`` and without the text before them. Pieces are placed into rows best fit first, once for all epochs (they
    do not see each other, so it does not matter which of them share a row); an epoch is a new order of the rows.

    With a context of 4, documents ``bos a b c d e eos`` (6 targets) and ``bos f eos`` (2 targets) are three pieces::

        start   0  4  7      first token of the piece in the stream
        length  4  2  2      positions, which are targets too: a piece reads length + 1 tokens
        row     0  1  1

        row 0   ids bos a b c    targets a b c d      segments 1 1 1 1
        row 1   ids d e bos f    targets e eos f eos  segments 1 1 2 2
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, pad_id: int) -> None:
        super().__init__(tokens, context, batch_size, pad_id)
        assert tokens.starts is not None
        bounds = tokens.starts
        targets = np.diff(bounds) - 1
        pieces = -(-targets // context)
        number = _ranges(np.zeros_like(pieces), pieces)  # 0, 1, ... within each document
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
        # Comments: both rows of the example above.
        counts = self._first[rows + 1] - self._first[rows]  # pieces of each row: 1 2
        piece = _ranges(self._first[rows], counts)  # 0 1 2
        row = np.repeat(np.arange(rows.size), counts)  # of each piece: 0 1 1
        segment = _ranges(np.ones_like(counts), counts)  # of each piece: 1 1 2
        length = self._length[piece]  # 4 2 2
        tokens = self._spans(self._start[piece], length + 1)  # bos a b c d, d e eos, bos f eos
        # Where the inputs of each piece are in ``tokens``, all but its last one: 0-3, 5-6, 8-9. Targets are one later.
        source = _ranges(np.cumsum(length + 1) - length - 1, length)
        # Positions before each piece, in all rows (0 4 6), then in its own row (0 0 2).
        taken = np.cumsum(length) - length
        taken -= np.repeat(taken[np.cumsum(counts) - counts], counts)
        place = _ranges(row * self.context + taken, length)  # in the flattened batch: 0-3, 4-5, 6-7
        ids = np.full(rows.size * self.context, self.pad_id, np.int64)
        targets = np.full_like(ids, IGNORE)
        segments = np.zeros_like(ids)
        ids[place], targets[place] = tokens[source], tokens[source + 1]
        segments[place] = segment.repeat(length)
        shape = (rows.size, self.context)
        columns = {"ids": ids, "targets": targets, "segments": segments}
        return self._batch(source.size, **{name: column.reshape(shape) for name, column in columns.items()})


def best_fit(lengths: NDArray[Any], capacity: int, pool: int = 4096) -> Index:
    """Return the row of each item: longest first, each into the fullest row that has space for it.

    Lengths 5, 3, 7, 2 and 3 with capacity 10: the 7 opens row 0, the 5 row 1; the first 3 fills row 0, which has less
    space left than row 1; the other 3 and the 2 fill row 1. The answer is [1, 0, 0, 1, 1].

    Items are placed in pools of ``pool``, each with rows of its own, so that the time is linear in their number.
    """
    rows = np.empty(len(lengths), np.int64)
    count = 0
    for begin in range(0, len(lengths), pool):
        part = lengths[begin : begin + pool]
        space: list[tuple[int, int]] = []  # (free positions, row), sorted
        for item in np.argsort(-part, kind="stable").tolist():
            length = int(part[item])
            at = bisect_left(space, (length, -1))  # the smallest space that is large enough
            if at < len(space):
                free, row = space.pop(at)
            else:
                free, row, count = capacity, count, count + 1
            rows[begin + item] = row
            if free > length:
                insort(space, (free - length, row))
    return rows


def _ranges(starts: NDArray[Any], counts: NDArray[Any]) -> Index:
    """Return start, start + 1, ..., count numbers for each pair: starts 5, 0 and counts 3, 2 give 5 6 7 0 1."""
    return np.asarray(np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()), np.int64)


def split_batches(items: Index, size: int) -> list[Index]:
    """Return the items in batches; the last one may be smaller."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
