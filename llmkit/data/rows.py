"""Rows as they are read, rows that cannot be used, and the count of what was skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmkit.errors import Problem, UserError, note

OnBadRow = Literal["error", "skip"]

SHOWN = 3  # bad rows that a note names
GIVE_UP = 10_000  # bad rows without a single good one: no need to read on


REPEATED = object()
"""The value of a column that a row has more than once."""


BLANK: Mapping[str, Any] = {}
"""The columns of a blank line where each line names its own. It is a row of a split to predict, and none of others."""


class Row(NamedTuple):
    """One row as it was read, and its place."""

    data: Mapping[str, Any]
    file: str
    number: int
    """Line of a text file, or row of a table, from 1; for several lines, the first of them."""
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

    def message(self, file: str) -> str:
        """Return the place, as a line or row of ``file``, and the problem, in one line."""
        return f"{file}:{self.number} {' '.join(self.problem.split())}"


RawRows = Iterator[Row | Bad]


@dataclass(frozen=True)
class Source:
    """Where the rows of a split come from; they can be read any number of times."""

    key: str  # the config key of the split, for messages
    names: list[str]  # files, or the split of a data set
    read: Callable[[], RawRows]
    single: bool = False  # plain text: one column, which serves as the only field that a head asks for
    files: list[str] = field(default_factory=list)  # cached results depend on their contents
    identity: Any = None  # and on this; None: on something that cannot be described, so that nothing is kept
    sharded: Callable[[int, int], RawRows] | None = None  # (shard, shards): the source can split itself
    advice: str = ""  # what may help when a column is missing


@dataclass
class Skipped:
    """Counts the bad rows of the latest pass over a split, and raises UserError where they are errors."""

    key: str  # the config key of the split
    policy: OnBadRow
    seen: int = 0  # rows of the pass, good or bad
    count: int = 0  # bad rows
    shown: list[str] = field(default_factory=list)  # the first of them
    at_once: bool = False  # whether the first one is reported when it is met, not only at the end

    def begin(self) -> None:
        """Begin a new pass."""
        self.seen = self.count = 0
        self.shown = []

    def add(self, bad: Bad) -> None:
        """Count a bad row. Raises UserError if bad rows are errors, or if the first ``GIVE_UP`` rows are all bad."""
        if self.policy == "error":
            # A bad first row hints at a wrong setting: skipping rows would not help.
            advice = " (to leave such rows out, set data.on_bad_row: skip)" if self.seen else ""
            raise UserError(Problem(self.key, f"{bad.message(bad.file)}{advice}"))
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(bad.message(Path(bad.file).name)[:200])
        if self.count == self.seen + 1 == GIVE_UP:
            raise UserError(Problem(self.key, f"the first {GIVE_UP:,} rows are bad: {self.shown[0]}"))
        if self.at_once and self.count == 1:
            note(f"{self.key}: skipped: {self.shown[0]}")

    def summary(self, seen: int) -> str:
        """Return how many of ``seen`` rows were skipped, and the first of them; empty when none were."""
        if not self.count:
            return ""
        more = [f"and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
        return f"{self.count:,} of {seen:,} rows skipped: " + "; ".join([*self.shown, *more])


def flaw(text: str, encoding: str = "") -> str | None:
    """Return what keeps a string from being valid text, or None.

    A lone surrogate in a text that was decoded with ``encoding`` stands for invalid bytes; otherwise it is an escape
    in JSON.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            if encoding:
                return f"is not {encoding} text. Set data.encoding to the encoding of the file"
            return "holds a lone surrogate, which is not a character,"
    if "\0" in text:
        return "holds a NUL character" + (f": is it text, and in {encoding} (data.encoding)?" if encoding else "")
    return None
