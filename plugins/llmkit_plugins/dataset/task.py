"""What all tasks share: rows of several lengths, drawn from a seed, that no two splits have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from llmkit.contracts import Dataset, Stage
from llmkit.errors import UserError

SPLITS: tuple[Stage, ...] = ("train", "validation", "test", "predict")
SHARES: dict[Stage, range] = {
    "train": range(0, 200), "validation": range(200, 228), "test": range(228, 256), "predict": range(228, 256)
}  # fmt: skip
"""Which rows a split may have, by the first byte of their hash."""
TRIES = 2000
"""Rows that are drawn in vain, one after the other, before a task is said to have too few different ones."""

NOTHING, ASK, BLANK = "-", "?", "_"
"""No answer is expected; an answer is asked for; filling without meaning."""

Draw = np.random.Generator


class Task(Dataset):
    """Rows with ``symbols`` and what is ``expected`` after each of them.

    Whether a row belongs to training, validation or test is decided by its hash, so that they share none, whatever
    their other arguments.

    Args:
        length: symbols of a row; several: rows of each of these lengths.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(self, length: int | list[int], examples: int, seed: int) -> None:
        self.lengths = [length] if isinstance(length, int) else list(length)
        self.examples, self.seed = examples, seed
        self.at_least(1, length=min(self.lengths, default=0), examples=examples)
        self.at_least(0, seed=seed)

    @staticmethod
    def at_least(least: int, **values: int) -> None:
        """Raise UserError for an argument that is too small."""
        for name, value in values.items():
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")

    def even(self) -> None:
        """Raise UserError for an odd length."""
        for length in self.lengths:
            if length % 2:
                raise UserError(f"length must be even, got {length}")

    @abstractmethod
    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return the symbols of a random row, and what is expected after each of them."""

    def rows(self, split: Stage) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a split. Raises UserError where there are too few different rows for several splits."""
        for length in self.lengths:
            draw = np.random.default_rng([self.seed, SPLITS.index(split), length])
            made = missed = 0
            while made < self.examples:
                symbols, expected = self.row(draw, length)
                text = " ".join(symbols)
                if blake2b(text.encode(), digest_size=1).digest()[0] in SHARES[split]:
                    made, missed = made + 1, 0
                    yield {"symbols": text, "expected": " ".join(expected)}
                else:
                    missed += 1
                if missed == TRIES:
                    name = type(self).__name__
                    raise UserError(f"{name} has too few different rows of length {length} to set some aside: {split}")


def picked(draw: Draw, items: list[str], count: int) -> list[str]:
    """Return so many items drawn at random, with repetition."""
    return [items[index] for index in draw.integers(len(items), size=count)]


def named(letter: str, count: int) -> list[str]:
    """Return so many symbols: ``a0``, ``a1``, ..."""
    return [f"{letter}{number}" for number in range(count)]
