"""Rows as they are read, those that cannot be used, and the count of what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmkit.errors import Problem, UserError, note

OnBadRow = Literal["error", "skip"]

SHOWN = 3  # bad rows that a note names
GIVE_UP = 10_000  # bad rows without a single good one: no need to read on


class Row(NamedTuple):
    """One row as it was read, and where it stands."""

    data: Mapping[str, Any]
    file: str
    number: int
    """Line of a text file, or row of a table, from 1; what has several lines has that of the first."""
    first: bool = True
    """Whether a document begins here; False for later chunks of a large text, and further questions of a paragraph."""
    lines: int = 1
    """How many rows a chunk of text counts as."""


class Bad(NamedTuple):
    """A row that cannot be used."""

    problem: str
    """Completes the sentence that begins with the place."""
    file: str
    number: int

    def told(self, file: str) -> str:
        """Return the place, as that of a line or row of ``file``, and the problem, in one line."""
        return f"{file}:{self.number} {' '.join(self.problem.split())}"


Read = Iterator[Row | Bad]


@dataclass(frozen=True)
class Rows:
    """A split: rows that can be read again and again."""

    key: str  # the config key it came from, for messages
    names: list[str]  # files, or the split of a data set
    read: Callable[[], Read]
    single: bool = False  # plain text: one column, which serves whatever single field the head asks for
    files: list[str] = field(default_factory=list)  # their contents say whether a cached result is still right
    identity: Any = None  # what else does
    sharded: Callable[[int, int], Read] | None = None  # (rank, world): the reader splits itself


@dataclass
class Skipped:
    """What is done with bad rows, and those of the latest pass over a split.

    Args:
        key: the config key of the split.
        policy: the setting ``data.on_bad_row``.
    """

    key: str
    policy: OnBadRow
    seen: int = 0
    """Rows of the pass, good or bad."""
    count: int = 0
    """Bad ones."""
    shown: list[str] = field(default_factory=list)
    """The first of them."""
    at_once: bool = False
    """Tell of the first one when it comes."""

    def begin(self) -> None:
        """Begin a new pass."""
        self.seen = self.count = 0
        self.shown = []

    def add(self, bad: Bad) -> None:
        """Count a bad row. Raises UserError where bad rows are errors, or nothing but bad rows has come for long."""
        if self.policy == "error":
            # Where the first row is bad already, it is rather a setting that is wrong.
            advice = " (to leave such rows out, set data.on_bad_row: skip)" if self.seen else ""
            raise UserError(Problem(self.key, f"{bad.told(bad.file)}{advice}"))
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(bad.told(Path(bad.file).name)[:200])
        if self.count == self.seen + 1 == GIVE_UP:
            raise UserError(Problem(self.key, f"the first {GIVE_UP:,} rows are bad: {self.shown[0]}"))
        if self.at_once and self.count == 1:
            note(f"{self.key}: skipped: {self.shown[0]}")

    def told(self, seen: int) -> str | None:
        """Return how many of ``seen`` rows were skipped, and the first of them; None when none were."""
        if not self.count:
            return None
        more = [f"and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
        return f"{self.count:,} of {seen:,} rows skipped: " + "; ".join([*self.shown, *more])


def flaw(text: str, encoding: str = "") -> str | None:
    """Return what keeps a string from being text that can be written, or None.

    A lone surrogate stands for bytes that are not of the ``encoding`` that the text was read in; elsewhere it is an
    escape of JSON.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            told = f"is not {encoding} text. Set data.encoding to the encoding of the file"
            return told if encoding else "holds a lone surrogate, which is no character,"
    if "\0" in text:
        return "holds a NUL character" + (f": is it text, and in {encoding} (data.encoding)?" if encoding else "")
    return None
