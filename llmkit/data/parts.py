"""Parts of a split that serves as several: training, validation and test documents, or the end of each text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.contracts import Stage
from llmkit.data.prepare import Item, ReadItems
from llmkit.errors import Problem, UserError, unknown

PARTS: tuple[Stage, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """How the documents (or rows) of ``data.train`` are shared out; the same for every ``data.seed``."""

    validation: float = 0.0
    test: float = 0.0
    fold: int = 0
    folds: int = 0
    """0: no folds. Otherwise the test part is fold number ``fold``, from 0, of as many."""

    @classmethod
    def checked(cls, validation: float, test: float, folds: int | None, fold: int, has_test: bool) -> Shares:
        """Return the shares that are configured. Raises UserError for values out of range, or that exclude each other.

        ``has_test`` is whether there is a test split already.
        """
        for name, share in {"validation_share": validation, "test_share": test}.items():
            if not 0 <= share < 1:
                raise UserError(Problem(f"data.{name}", f"must be 0 or more and below 1, got {share}"))
        if validation + test >= 1:
            raise UserError(
                Problem("data.test_share", f"leaves nothing to train on: {validation} + {test} is not below 1")
            )
        if folds is not None and folds < 2:
            raise UserError(Problem("data.folds", f"must be at least 2, got {folds}"))
        if not 0 <= fold < (folds or 1):
            expected = f"0 to {folds - 1}" if folds else "data.folds to be set"
            raise UserError(Problem("data.fold", f"expected {expected}, got {fold}"))
        if folds and test:
            raise UserError(Problem("data.folds", "cannot be combined with data.test_share: one fold is the test part"))
        if (folds or test) and has_test:
            key = "data.folds" if folds else "data.test_share"
            raise UserError(
                Problem(key, "cuts the test part from data.train, but data.test is set too: set one of the two")
            )
        return cls(validation, test, fold, folds or 0)

    @property
    def cut_test(self) -> bool:
        """Whether the test rows come from ``data.train``."""
        return self.test > 0 or self.folds > 0

    def of(self, count: int, key: str) -> NDArray[np.int8]:
        """Return which of ``PARTS`` each document is in: a random share, at least one document, in each that is used.

        Raises UserError, for the config key of the split, when there are too few of them.
        """
        used = 1 + (self.validation > 0) + self.cut_test
        if count < max(used, self.folds):
            if count == 1 and used == 2 and self.validation:
                raise UserError(Problem(key, "has one row only, none is left for validation. Set data.validation."))
            raise UserError(Problem(key, f"has {count} rows, too few for {max(used, self.folds)} parts"))
        order = np.random.default_rng(0).permutation(count)
        if self.folds:
            begin, end = count * self.fold // self.folds, count * (self.fold + 1) // self.folds
        else:
            begin, end = count - self._number(count, self.test, used), count
        rest = np.concatenate([order[:begin], order[end:]])
        parts = np.zeros(count, np.int8)
        parts[order[begin:end]] = PARTS.index("test")
        # The same rows whether or not there is a test part.
        parts[rest[: min(self._number(count, self.validation, used), len(rest) - 1)]] = PARTS.index("validation")
        return parts

    @staticmethod
    def _number(count: int, share: float, used: int) -> int:
        """Return how many documents a share is; one is left to each other part."""
        return min(max(1, round(count * share)), count - used + 1) if share else 0


class Measured(NamedTuple):
    """What is known of a split before it is cut."""

    sizes: NDArray[np.int64]
    """Characters of each document, zeros where there is no text to cut, (documents,)."""
    classes: NDArray[np.int64]
    """Pairs of a document and the number of a class that it has, (pairs, 2)."""

    def chosen(self, shares: Shares, key: str) -> NDArray[np.int8]:
        """Return which of ``PARTS`` each document is in; see ``Shares.of``.

        A document whose class no document of the training part has is moved there. Raises UserError when that leaves
        nothing for a part.
        """
        parts = shares.of(len(self.sizes), key)
        documents, classes = self.classes.T
        numbers, first = np.unique(classes, return_index=True)
        lacking = ~np.isin(numbers, classes[parts[documents] == 0])
        used = set(parts.tolist())
        parts[documents[first[lacking]]] = 0
        for name in (PARTS[part] for part in used - set(parts.tolist())):
            text = f"each row that would be set aside for {name} has a class that no other row has. Set data.{name}."
            raise UserError(Problem(key, text))
        return parts


def measure(read: ReadItems, text: str | None, classes: Sequence[str]) -> Measured:
    """Measure a split: the characters of the field ``text``, and the values of the fields ``classes``."""
    sizes, pairs = array("q"), array("q")
    numbers: dict[str, int] = {}
    for item in read():
        if item.document == len(sizes):
            sizes.append(0)
        if text:
            sizes[-1] += len(item.fields[text])
        for name in classes:
            value = item.fields[name]
            for part in value if isinstance(value, list) else [value]:
                pairs.extend((item.document, numbers.setdefault(str(part), len(numbers))))
    return Measured(np.array(sizes, np.int64), np.array(pairs, np.int64).reshape(-1, 2))


def cut(read: ReadItems, measured: Measured, key: str, shares: Shares, part: Stage, text: str | None) -> Iterator[Item]:
    """Yield one part of a split that serves as several.

    Of several documents (or rows) each part gets random whole ones. Where they are texts, and so few or so unequal
    that a part would be less than half or more than twice the characters asked for, each text is cut instead: 0.1 of
    50 characters are the last 5, and a test part comes after the validation part.

    Args:
        read: reads the whole split.
        measured: the measured split.
        key: the config key of the split. Raises UserError for it when there are too few rows.
        shares: the shares of the parts.
        part: the part to yield.
        text: the field that is a text which can be cut; None: rows cannot be cut.
    """
    if not len(measured.sizes):
        return
    if text is None or shares.folds or _fair(measured.sizes, shares, key):
        chosen = measured.chosen(shares, key) == PARTS.index(part)
        yield from (item for item in read() if chosen[item.document])
        return
    borders = [0.0, 1 - shares.validation - shares.test, 1 - shares.test, 1.0]
    first, last = borders[PARTS.index(part) :][:2]
    document, at = -1, 0  # where the text of this item begins in its document
    for item in read():
        if item.document != document:
            document, at = item.document, 0
        size = int(measured.sizes[document])
        value = item.fields[text]
        piece = value[max(0, int(size * first) - at) : max(0, int(size * last) - at)]
        at += len(value)
        if piece:
            yield item._replace(fields={**item.fields, text: piece})


def _fair(sizes: NDArray[np.int64], shares: Shares, key: str) -> bool:
    """Return whether whole documents make parts of about the characters that are asked for."""
    if len(sizes) < 1 + (shares.validation > 0) + (shares.test > 0):
        return False
    got = np.bincount(shares.of(len(sizes), key), sizes, len(PARTS)) / max(1, int(sizes.sum()))
    asked = (shares.validation, shares.test)
    return all(share / 2 <= part <= 2 * share for share, part in zip(asked, got[1:], strict=True))


def limited(read: ReadItems, total: int, limit: int, documents: bool) -> Iterator[Item]:
    """Yield ``limit`` random rows (or documents) of ``total``, in their order.

    A larger limit adds to the rows of a smaller one.
    """
    chosen = np.zeros(max(total, 1), bool)
    chosen[np.random.default_rng(0).permutation(total)[:limit]] = True
    for number, item in numbered(read, documents):
        if chosen[number]:
            yield item


def numbered(read: ReadItems, documents: bool) -> Iterator[tuple[int, Item]]:
    """Yield items with their number, or that of their document, from 0 without gaps."""
    number, document = -1, -1
    for item in read():
        if not documents or item.document != document:
            number, document = number + 1, item.document
        yield number, item


def checked_limits(limit: int | dict[str, int] | None) -> dict[Stage, int]:
    """Return the limit of each split. Raises UserError for another split, or a limit below 1."""
    given = limit if isinstance(limit, dict) else dict.fromkeys(PARTS, limit)
    found: dict[Stage, int] = {}
    for name, value in given.items():
        if name not in PARTS:
            raise UserError(Problem("data.limit", unknown("split", name, PARTS)))
        if value is not None and value < 1:
            raise UserError(Problem("data.limit", f"must be at least 1, got {value}"))
        if value is not None:
            found[name] = value
    return found
