"""Features of examples as flat arrays on disk, and the batches of similar lengths that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.contracts import Batch, Head, Tokenizer
from llmkit.data.tokens import Index
from llmkit.errors import note


class Features:
    """Features of examples, column by column: ints as one array, lists of ints as one flat array and their ends."""

    def __init__(self) -> None:
        self.count = 0
        self.values: dict[str, NDArray[np.int64]] = {}
        self.ends: dict[str, NDArray[np.int64]] = {}

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, list[Any]]]) -> Features:
        """Collect what the head's ``encode`` gave.

        Raises TypeError for features of another type, or that come in unequal numbers.
        """
        self = cls()
        values: dict[str, list[NDArray[np.int64]]] = {}
        lengths: dict[str, list[NDArray[np.int64]]] = {}
        for batch in batches:
            sizes = {name: len(column) for name, column in batch.items()}
            if len(set(sizes.values())) > 1 or (values and values.keys() != batch.keys()):
                raise TypeError(f"the head's encode gave features of unequal numbers or names: {sizes}")
            for name, column in batch.items():
                if column and isinstance(column[0], list):
                    lengths.setdefault(name, []).append(np.fromiter(map(len, column), np.int64, len(column)))
                    column = [item for value in column for item in value]
                array = np.asarray(column) if column else np.empty(0, np.int64)
                if array.ndim != 1 or array.dtype.kind not in "biu":
                    raise TypeError(f"the head's feature '{name}' must be ints or lists of ints")
                values.setdefault(name, []).append(array.astype(np.int64))
            self.count += next(iter(sizes.values()), 0)
        self.values = {name: np.concatenate(parts) for name, parts in values.items()}
        self.ends = {name: np.cumsum(np.concatenate([[0], *parts])) for name, parts in lengths.items()}
        return self

    def write(self, folder: Path) -> None:
        """Write the features into a folder."""
        np.savez(folder / "values.npz", **self.values)  # type: ignore[arg-type]
        np.savez(folder / "ends.npz", **self.ends)  # type: ignore[arg-type]
        (folder / "count").write_text(str(self.count))

    @classmethod
    def read(cls, folder: Path) -> Features:
        """Return what ``write`` wrote."""
        self = cls()
        with np.load(folder / "values.npz") as values, np.load(folder / "ends.npz") as ends:
            self.values, self.ends = dict(values), dict(ends)
        self.count = int((folder / "count").read_text())
        return self

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the features of one example, as the head's ``encode`` gave them."""
        found: dict[str, Any] = {}
        for name, values in self.values.items():
            ends = self.ends.get(name)
            found[name] = (values[index] if ends is None else values[ends[index] : ends[index + 1]]).tolist()
        return found


class Examples:
    """Examples of a split, batched by length.

    A batch holds ``batch_size`` rows or, with ``batch_tokens``, as many as fit when all are as long as the longest.
    Training order: sorted by length with ties in random order, cut into batches, batches shuffled; lengths count as
    equal within 1/16, so that long rows change their company too. Each example comes once an epoch, and every epoch
    has the same number of batches.
    Evaluation order: longest first, so that running out of memory shows at once.
    """

    def __init__(
        self, features: Features, head: Head, tokenizer: Tokenizer, batch_size: int, batch_tokens: int | None
    ) -> None:
        self.features, self.head, self.tokenizer = features, head, tokenizer
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self._count = features.count
        lists = [np.diff(ends) for ends in features.ends.values()] or [np.zeros(self._count, np.int64)]
        lengths = features.values.get("length", sum(lists))
        width = np.maximum(1, 2 ** np.floor(np.log2(np.maximum(lengths, 1)) - 4)).astype(np.int64)
        self._rounded = -(-lengths // width) * width  # up to a multiple: what a batch is planned with
        self._blur = 1 + lengths / 16
        # A translation pads two lists: equals are sorted by the difference. Every other length goes from the other end,
        # so that a batch of two lengths holds neighbours.
        turn = 1 - 2 * (np.unique(self._rounded, return_inverse=True)[1] % 2)
        skew = features.values.get("skew")
        self._skew = lists[0] - sum(lists[1:]) if skew is None else turn * skew
        self._bounds = self._cut(np.sort(self._rounded))

    def __len__(self) -> int:
        """Number of examples."""
        return self._count

    @property
    def training_rows(self) -> int:
        """Number of rows of an epoch."""
        return self._count

    @property
    def num_batches(self) -> int:
        """Number of training batches of an epoch."""
        return len(self._bounds) - 1

    def _cut(self, lengths: NDArray[Any]) -> Index:
        """Return where batches of these lengths, shortest first, begin, and the end of the last one."""
        if self.batch_tokens is None:
            return np.append(np.arange(0, len(lengths), self.batch_size), len(lengths))
        bounds = [len(lengths)]
        # From the longest down: the first row of a batch is then its longest.
        while bounds[-1] > 0:
            longest = max(int(lengths[bounds[-1] - 1]), 1)
            bounds.append(max(0, bounds[-1] - max(1, self.batch_tokens // longest)))
        return np.array(bounds[::-1])

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the batches of an epoch."""
        order = np.lexsort((self._skew + self._blur * rng.random(self._count), self._rounded))
        batches = self._split(order)
        return [batches[i] for i in rng.permutation(len(batches))]

    def evaluation_order(self) -> Sequence[Index]:
        """Return the batches of an evaluation, longest first."""
        return self._split(np.lexsort((self._skew, self._rounded)))[::-1]

    def reading_order(self) -> Sequence[Index]:
        """Return batches in the order of the rows (predictions are read beside their rows)."""
        return [np.arange(i, min(i + self.batch_size, self._count)) for i in range(0, self._count, self.batch_size)]

    def _split(self, order: Index) -> list[Index]:
        return np.split(order, self._bounds[1:-1])

    def __getitem__(self, indices: Index) -> Batch:
        """Return these examples as one batch of the head's ``collate``."""
        return self.head.collate([self.features[index] for index in indices.tolist()], self.tokenizer)


def note_truncated(head: Head, truncated: Iterable[int] | None, total: int, context: int, where: str = "") -> None:
    """Tell how many texts were longer than the context and what became of them."""
    count = 0 if truncated is None else sum(map(int, truncated))
    if count:
        note(
            f"{count:,} of {total:,} texts{where} are longer than model.context ({context} tokens): "
            f"the {head.kept} of each is used"
        )
