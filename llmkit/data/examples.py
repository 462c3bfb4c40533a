"""Features of examples as flat arrays on disk, and the batches of similar lengths that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.contracts import IGNORE, Batch, Head, Stage, Tokenizer
from llmkit.data.batches import halved
from llmkit.data.tokens import Index, split_batches
from llmkit.errors import note, returned
from llmkit.sequence import padded


@dataclass(frozen=True)
class Features:
    """Features of examples, column by column, each as one flat array.

    ``values`` of ints: one per example. Of lists of ints: the lists one after the other. Of strings: their UTF-8
    bytes. In the last two cases ``ends`` says where each example ends: texts ``["ab", "", "c"]`` are the bytes ``abc``
    and the ends ``[0, 2, 2, 3]``. Numbers are read into memory, texts stay on disk.
    """

    values: dict[str, NDArray[Any]]
    ends: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, list[Any]]]) -> Features:
        """Collect what the head's ``encode`` returned.

        Raises TypeError for features of another type, or with unequal numbers of values.
        """
        values: dict[str, list[NDArray[Any]]] = {}
        lengths: dict[str, list[NDArray[np.int64]]] = {}
        for batch in batches:
            sizes = {name: len(column) for name, column in batch.items()}
            if len(set(sizes.values())) > 1 or (values and values.keys() != batch.keys()):
                raise TypeError(f"the head's encode returned features of unequal numbers or names: {sizes}")
            for name, column in batch.items():
                array, each = _flat(name, column)
                values.setdefault(name, []).append(array)
                if each is not None:
                    lengths.setdefault(name, []).append(each)
                if array.dtype != values[name][0].dtype:
                    raise TypeError(f"the head's feature '{name}' must be strings in every row, or in none")
        return cls(
            {name: np.concatenate(parts) for name, parts in values.items()},
            {name: np.cumsum(np.concatenate([[0], *parts])) for name, parts in lengths.items()},
        )

    @property
    def count(self) -> int:
        """Number of examples."""
        name = next(iter(self.values), None)
        return 0 if name is None else len(self.ends[name]) - 1 if name in self.ends else len(self.values[name])

    def write(self, folder: Path) -> None:
        """Write the features into a folder."""
        numbers = {name: values for name, values in self.values.items() if values.dtype != np.uint8}
        np.savez(folder / "values.npz", **numbers)  # type: ignore[arg-type]
        np.savez(folder / "ends.npz", **self.ends)  # type: ignore[arg-type]
        for name, path in self._texts(folder, numbers).items():
            path.write_bytes(self.values[name].data)

    @classmethod
    def read(cls, folder: Path) -> Features:
        """Return what ``write`` wrote."""
        with np.load(folder / "values.npz") as values, np.load(folder / "ends.npz") as ends:
            self = cls(dict(values), dict(ends))
        for name, path in self._texts(folder, self.values).items():
            # An empty file cannot be mapped.
            self.values[name] = np.asarray(np.memmap(path, np.uint8, "r") if self.ends[name][-1] else [], np.uint8)
        return self

    def _texts(self, folder: Path, numbers: Mapping[str, Any]) -> dict[str, Path]:
        """Return the file of each text: of each feature that has ends and is not among the numbers."""
        return {name: folder / f"text{i}.bin" for i, name in enumerate(self.ends) if name not in numbers}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the features of one example, as the head's ``encode`` returned them."""
        found: dict[str, Any] = {}
        for name, values in self.values.items():
            ends = self.ends.get(name)
            part = values[index] if ends is None else values[ends[index] : ends[index + 1]]
            found[name] = part.tobytes().decode("utf-8", "surrogatepass") if part.dtype == np.uint8 else part.tolist()
        return found


def _flat(name: str, column: list[Any]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """Return a column of features as one array and, for lists and strings, the length of each value."""
    if column and all(isinstance(value, str) for value in column):
        texts = [value.encode("utf-8", "surrogatepass") for value in column]
        return np.frombuffer(b"".join(texts), np.uint8), np.fromiter(map(len, texts), np.int64, len(texts))
    lengths = None
    if column and isinstance(column[0], list):
        lengths = np.fromiter(map(len, column), np.int64, len(column))
        column = [item for value in column for item in value]
    array = np.asarray(column) if column else np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "biu":
        raise TypeError(f"the head's feature '{name}' must be ints, lists of ints or strings")
    return array.astype(np.int64), lengths


WINDOW = 3.0
"""How far a row moves from its place among rows of similar length in each epoch, in batches. With 3, of the pairs of
rows that share a batch (of 32), 11 % of SST-2's and 20 % of DialogSum's share one in the next epoch too, for 1 and 2 %
more padding. A wider window mixes more and pads more: 6 batches bring 8 and 11 % together again for another 1.5 and
2.6 %. Pools of 25 to 100 batches that are sorted by length, and moves in proportion to the length, lie close to that
curve or pad more."""


class Examples:
    """Examples of a split, batched by length.

    A batch holds ``batch_size`` rows or, with ``batch_tokens``, as many as fit when all are padded to the longest,
    rounded down (``round_number``).
    Training order: sorted by length, each row moved by a random distance of up to ``WINDOW`` batches, cut into batches,
    batches shuffled. Rows meet other rows in each epoch, and no border between two batches stays. Each example comes
    once an epoch, and every epoch has the same number of batches: where rows would fit into fewer, some are halved.
    Evaluation order: sorted and cut, longest first.

    Lengths 3, 9, 4, 10 and 5 with ``batch_tokens: 20`` are evaluated in two batches: 20 // 10 rows with the 10, and
    20 // 5 with the 5. The batches are (10, 9) and (5, 4, 3), 20 and 15 tokens with padding.

    With ``row_tokens`` the examples of a batch share rows of up to so many tokens (``packed``).
    """

    def __init__(
        self,
        features: Features,
        head: Head,
        tokenizer: Tokenizer,
        batch_size: int,
        batch_tokens: int | None,
        row_tokens: int = 0,
    ) -> None:
        self.features, self.head, self.tokenizer = features, head, tokenizer
        self.batch_size, self.batch_tokens, self.row_tokens = batch_size, batch_tokens, row_tokens
        self.training_rows = features.count
        # The lengths of each feature that is a list of ints; a text (bytes) has none.
        lists = [np.diff(ends) for name, ends in features.ends.items() if features.values[name].dtype != np.uint8]
        lists = lists or [np.zeros(len(self), np.int64)]
        self.lengths = np.maximum(features.values.get("length", sum(lists)), 1)
        # A translation pads two lists: rows of similar length are sorted by the difference of the two. Similar are
        # lengths that are equal when rounded up to multiples of a power of two, 1/32 to 1/16 of the length: 31 stays
        # 31, 33 becomes 34, 130 becomes 136.
        width = np.maximum(1, 2 ** np.floor(np.log2(self.lengths) - 4)).astype(np.int64)
        self._rounded = -(-self.lengths // width) * width
        # Every second length is sorted backwards, so that a batch across the border of two has similar differences.
        turn = 1 - 2 * (np.unique(self._rounded, return_inverse=True)[1] % 2)
        skew = features.values.get("skew")
        if skew is None and len(lists) > 1:
            skew = lists[0] - sum(lists[1:])
        self._skew = self.lengths if skew is None else turn * skew
        # How many batches the rows up to each place of the sorted order fill.
        sizes = batch_size if batch_tokens is None else np.maximum(1, batch_tokens // np.sort(self.lengths))
        self._places = np.cumsum(np.ones(len(self)) / sizes)
        self.num_batches = -(-len(self) // batch_size)  # of a training epoch
        if batch_tokens is not None:
            # Epochs differ by a batch or two: 1 % is added, so that most of them fit.
            count = len(self._cut(self._mixed(np.random.default_rng(0), WINDOW)))
            self.num_batches = min(len(self), count + -(-count // 100))

    def __len__(self) -> int:
        """Number of examples."""
        return self.training_rows

    def step_note(self, batches: int, accumulated: int, processes: int) -> str:
        """Return what ``batch_tokens`` makes of an optimizer step: texts may be far shorter than one expects.

        Args:
            batches: number of batches of an epoch in each process.
            accumulated: how many of them a step takes.
            processes: how many train together.
        """
        steps = -(-batches // accumulated)
        rows, each = self.training_rows / steps, min(accumulated, batches) * processes
        made = [f"{processes} processes"] * (processes > 1)
        made += [f"trainer.accumulate_grad_batches {accumulated}"] * (accumulated > 1)
        size = f"{each} batch{'es' * (each > 1)}{': ' * bool(made)}{', '.join(made)}"
        text = f"an optimizer step holds {rows:,.0f} rows on average ({size})"
        return f"data.batch_tokens {self.batch_tokens:,}: {text}, an epoch has {steps:,} step{'s' * (steps > 1)}"

    def _sorted(self, rng: np.random.Generator) -> Index:
        """Return the rows by length, then by the difference of their two texts, ties at random."""
        return np.lexsort((self._skew + rng.random(len(self)), self._rounded))

    def _mixed(self, rng: np.random.Generator, window: float) -> Index:
        """Return the rows by length, each moved by up to ``window`` batches."""
        order = self._sorted(rng)
        return order[np.argsort(self._places + window * rng.random(len(self)), kind="stable")]

    def _cut(self, order: Index) -> list[Index]:
        """Return rows in batches, each as large as it may be."""
        if self.batch_tokens is None:
            return split_batches(order, self.batch_size)
        lengths, bounds = self.lengths[order], [0]
        while bounds[-1] < len(order):
            begin = bounds[-1]
            rows = lengths[begin : begin + max(1, self.batch_tokens // lengths[begin])]
            tokens = np.maximum.accumulate(rows) * np.arange(1, len(rows) + 1)  # of the first 1, 2, ... rows, padded
            fitting = max(1, int(np.searchsorted(tokens, self.batch_tokens, side="right")))
            bounds.append(begin + (round_number(fitting) if begin + fitting < len(order) else fitting))
        return np.split(order, bounds[1:-1])

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the batches of an epoch."""
        if self.batch_tokens is None:
            # The batch that is not full stands anywhere, which moves the borders of those after it.
            order, short = self._mixed(rng, WINDOW), int(rng.integers(self.num_batches)) * self.batch_size
            rest = len(self) - (self.num_batches - 1) * self.batch_size
            batches = [*self._cut(order[:short]), order[short : short + rest], *self._cut(order[short + rest :])]
        else:
            seed = rng.integers(2**63)
            orders = (self._mixed(np.random.default_rng(seed), WINDOW / 2**halvings) for halvings in range(4))
            # No order takes fewer batches than that by length.
            last = np.argsort(self.lengths, kind="stable")[::-1]
            cuts = (self._cut(order) for order in chain(orders, [last]))
            batches = halved(next(cut for cut in cuts if len(cut) <= self.num_batches), self.num_batches)
        return [batches[i] for i in rng.permutation(len(batches))]

    def evaluation_order(self) -> Sequence[Index]:
        """Return the batches of an evaluation, longest first."""
        return self._cut(self._sorted(np.random.default_rng(0))[::-1])

    def reading_order(self) -> Sequence[Index]:
        """Return batches in the order of the rows, which predictions keep."""
        return split_batches(np.arange(len(self)), self.batch_size)

    def __getitem__(self, indices: Index) -> Batch:
        """Return these examples as one batch of the head's ``collate``, with their numbers as ``rows``."""
        numbers = indices.tolist()
        batch = self.head.collate([self.features[index] for index in numbers], self.tokenizer)
        if not isinstance(batch, dict):
            raise returned(self.head, "collate", batch, "a dict of tensors and lists of strings")
        if self.row_tokens and "targets" in batch:
            batch = packed(batch, self.row_tokens, self.tokenizer.pad_id)
        return {**batch, "rows": torch.tensor(numbers)}


def packed(batch: Batch, length: int, pad: int) -> Batch:
    """Return a batch of a decoder whose examples share rows, each with a number as its segment: none sees another.

    The longest comes first, each into the first row that has room for it.

    Args:
        batch: ``ids`` and ``targets``, (B, T), and ``segments`` where they are padded at the right.
        length: most tokens of a row that holds several examples.
        pad: fills rows up.
    """
    ids, targets = batch["ids"].tolist(), batch["targets"].tolist()
    segments = batch.get("segments")
    lengths = [len(row) for row in ids] if segments is None else segments.sum(1).tolist()
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(range(len(ids)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if left >= lengths[example]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(example)
        room[row] -= lengths[example]

    def joined(of: Callable[[int, int], list[int]], fill: int) -> Tensor:
        return padded([[item for n, example in enumerate(row) for item in of(n, example)] for row in rows], fill)

    return {
        **batch,
        "ids": joined(lambda n, example: ids[example][: lengths[example]], pad),
        "targets": joined(lambda n, example: targets[example][: lengths[example]], IGNORE),
        "segments": joined(lambda n, example: [n + 1] * lengths[example], 0),
    }


def round_number(rows: int) -> int:
    """Return the number of four binary digits followed by zeros that is next below: 250 becomes 240, 23 becomes 22.

    Batches then have few different shapes, for each of which a CPU's library compiles kernels and keeps them.
    """
    zeros = max(0, rows.bit_length() - 4)
    return rows >> zeros << zeros


def note_features(head: Head, features: Features, context: int, stage: Stage) -> None:
    """Note how many rows of a split are cut to the context, and how many are marked by the head (``Head.notes``)."""
    note_truncated(head, features.values.get("truncated"), features.count, context, f" in data.{stage}")
    for name, text in head.notes.items():
        marked = int(features.values.get(name, np.zeros(1)).sum())
        if marked:
            note(f"data.{stage}: {marked:,} of {features.count:,} rows {text}")


def note_truncated(head: Head, truncated: Iterable[int] | None, total: int, context: int, where: str = "") -> None:
    """Note how many texts are longer than the context, and which part of them is used."""
    count = 0 if truncated is None else sum(map(int, truncated))
    if count:
        note(
            f"{count:,} of {total:,} texts{where} are longer than model.context ({context} tokens): "
            f"the {head.kept} of each is used"
        )
