"""Fingerprints of rows, to count those that two splits have in common."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llmkit.contracts import Stage
from llmkit.data.prepare import Item

FILE = "rows.npy"


class Fingerprints:
    """The 64-bit hashes of the inputs of rows.

    Args:
        names: the fields that are hashed.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._found = array("Q")

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items and keep their fingerprints."""
        for item in items:
            text = "\0".join(str(item.fields[name]) for name in self.names)
            digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self._found.append(int.from_bytes(digest, "little"))
            yield item

    def write(self, folder: Path) -> None:
        """Write them into a folder."""
        np.save(folder / FILE, np.array(self._found, np.uint64))

    @staticmethod
    def common(folder: Path, other: Path) -> tuple[int, int]:
        """Return how many rows of a folder are in the other one too, and how many there are."""
        rows = np.load(folder / FILE)
        return int(np.isin(rows, np.load(other / FILE)).sum()), len(rows)


def shared_rows(train: Path, entries: Mapping[Stage, Path], inputs: tuple[str, ...]) -> Iterator[str]:
    """Yield a note for each evaluation split with rows whose inputs are those of a training row."""
    stages: tuple[Stage, ...] = ("validation", "test")
    for stage in stages:
        try:
            same, total = Fingerprints.common(entries[stage], train)
        except (KeyError, OSError, ValueError):  # not prepared, or not in the cache any more, or damaged there
            continue
        if same:
            yield f"data.{stage}: {same:,} of {total:,} rows have the {' and '.join(inputs)} of a row of data.train"
