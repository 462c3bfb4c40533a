"""The properties of generated data sets."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch

from llmkit.contracts import Dataset, Stage
from llmkit.testing.numerics import seeded
from llmkit.testing.report import Properties, Violation, one_line

PROPERTIES: Properties[Subject] = Properties()
SPLITS: tuple[Stage, ...] = ("train", "validation", "test")
LOOKED_AT = 50
"""Rows of each split that are looked at."""
Rows = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A data set under test.

    Attributes:
        factory: builds it.
        seed: of everything that a data set must not depend on.
    """

    factory: functools.partial[Any]
    seed: int = 0

    def first(self, split: Stage, dataset: Dataset | None = None) -> Rows:
        """Return the first rows of a split, of a new data set unless one is given."""
        return list(islice((dataset or self.factory()).rows(split), LOOKED_AT))

    @functools.cached_property
    def known(self) -> dict[Stage, Rows]:
        """The first rows of each split."""
        with seeded(self.seed):
            random.seed(self.seed)
            np.random.seed(self.seed)
            return {split: self.first(split) for split in SPLITS}


def subject(factory: functools.partial[Any], *, seed: int = 0) -> Subject:
    """Return the subject."""
    return Subject(factory, seed)


@PROPERTIES(
    "train has rows, and all rows are mappings with the same columns; values are texts, numbers, or lists of them",
    "The data cannot be read, or some of its rows are refused.",
    essential=True,
)
def rows(subject: Subject) -> str:
    columns: list[str] | None = None
    for split, found in subject.known.items():
        if not found and split == "train":
            raise Violation("train has no rows")
        for number, row in enumerate(found):
            if not isinstance(row, Mapping):
                raise Violation(f"row {number} of {split} is a {type(row).__name__}, expected a mapping")
            columns = list(row) if columns is None else columns
            if list(row) != columns:
                raise Violation(f"row {number} of {split} has the columns {list(row)}, the first one has {columns}")
            for name, value in row.items():
                parts = value if isinstance(value, list) else [value]
                wrong = [part for part in parts if not isinstance(part, str | int | float)]
                if wrong:
                    raise Violation(f"column '{name}' of row {number} of {split} has a {type(wrong[0]).__name__}")
    return ", ".join(columns or [])


@PROPERTIES(
    "a split has the same rows whenever it is read, whatever else draws random numbers",
    "A resumed run, another process or another seed of the training sees other data.",
)
def repeatable(subject: Subject) -> None:
    dataset = subject.factory()
    for split, expected in subject.known.items():
        for how, again in (("of another data set", None), ("read twice", dataset), ("read twice", dataset)):
            with seeded(subject.seed + 1):
                random.seed(subject.seed + 1)
                np.random.seed(subject.seed + 1)
                found = subject.first(split, again)
            for number, (a, b) in enumerate(zip_longest(found, expected)):
                if a != b:
                    raise Violation(f"{split}, {how}: row {number} is {one_line(a, 60)}, was {one_line(b, 60)}")


@PROPERTIES("reading rows leaves the random state as it was", "What is drawn in training depends on the cache.")
def random_state(subject: Subject) -> None:
    with seeded(subject.seed):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        subject.first("train")
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    for name, a, b in zip(("random", "numpy.random", "torch"), before, after, strict=True):
        if a != b:
            raise Violation(f"{LOOKED_AT} rows changed the state of {name}: draw from a generator of your own")


@PROPERTIES("no two splits share a row", "Validation and test measure what was learned by heart.")
def splits_apart(subject: Subject) -> None:
    seen: dict[str, Stage] = {}
    for split, found in subject.known.items():
        for row in found:
            other = seen.setdefault(repr(sorted(row.items())), split)
            if other != split:
                raise Violation(f"{other} and {split} have the row {one_line(row, 100)}")
