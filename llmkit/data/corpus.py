"""Which rows belong to which stage, and how the head's fields of them are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmkit.contracts import Head, Stage
from llmkit.data import cache
from llmkit.data.formats import Options
from llmkit.data.hub import Hub
from llmkit.data.prepare import Fields, Item, cut, measure
from llmkit.data.rows import OnBadRow, Rows, Skipped
from llmkit.data.sources import Files, local
from llmkit.data.stream import HELD_OUT, take
from llmkit.errors import Problem, UserError


class Reader(NamedTuple):
    """The rows of a stage, how to read their items (again and again), and what says that they are still the same."""

    rows: Rows
    read: Callable[..., Iterator[Item]]
    """Takes (shard, number of shards) for training data; the default is everything."""
    identity: list[Any]
    skipped: Skipped
    """What the latest reading left out."""

    def check(self) -> None:
        """Raise UserError when there is no row, or none that is good."""
        if next(self.read(), None) is None:
            raise self.empty(self.skipped)

    def empty(self, skipped: Skipped) -> UserError:
        """Return the error for a split without rows, because none are there or because these were skipped."""
        told = skipped.told(self.skipped.seen)
        because = f": {told}" if told else ""
        return UserError(Problem(self.rows.key, f"no rows in {', '.join(self.rows.names)}{because}"))


@dataclass
class Corpus:
    """The rows of all stages; see the arguments of the same names of ``DataModule``."""

    given: dict[Stage, Files]
    source: str | None
    subset: str | None
    options: Options
    on_bad_row: OnBadRow
    columns: dict[str, str] | None
    documents: Literal["file", "line"]
    validation_share: float
    streaming: bool
    folder: Path
    _sizes: dict[str | None, tuple[int, int]] = field(default_factory=dict, init=False)

    @cached_property
    def hub(self) -> Hub:
        """The data set that ``source`` names."""
        assert self.source is not None
        return Hub(self.source, self.subset, self.streaming)

    def has(self, stage: Stage) -> bool:
        """Whether there are rows for a stage."""
        return self._given(stage) is not None or (stage == "validation" and self._cut() and self.has("train"))

    def joins(self, stage: Stage, head: Head) -> bool:
        """Whether rows become one stream of tokens."""
        return head.layout == "blocks" and stage != "predict"

    def reader(self, stage: Stage, head: Head) -> Reader:
        """Return the reader of a stage. Raises UserError when nothing is configured or files are missing."""
        part = self._cut() and stage in ("train", "validation")
        rows = self._rows("train" if part else stage, chunks=self.joins(stage, head) and self.documents == "file")
        fields = Fields.of(head, self.columns, stage == "predict")
        columns = [(name, fields.column(name, rows), name in fields.texts) for name in fields.needed]
        # The content of files too large to be tokenized ahead is not read for a hash either.
        files = [_stat(file) if self.streaming else cache.file_digest(file, self.folder) for file in rows.files]
        identity: list[Any] = [files, rows.identity, columns, self.on_bad_row]
        skipped = Skipped(rows.key, self.on_bad_row)
        if not part:
            return Reader(rows, partial(_sharded, rows, fields, skipped), identity, skipped)
        rows = replace(rows, sharded=None)  # what shards begin with is not what the whole begins with
        read = partial(_sharded, rows, fields, skipped)
        if self.streaming:
            identity += [stage, HELD_OUT]
            if stage == "validation":
                return Reader(rows, lambda: take(read(), HELD_OUT), identity, skipped)
            size = sum(1 for _ in take(read(), HELD_OUT))
            if size and next(islice(read(), size, None), None) is None:
                raise UserError(
                    Problem(rows.key, f"all {size} rows would be set aside for validation. Set data.validation.")
                )
            return Reader(rows, partial(_sharded, rows, fields, skipped, skip=size), identity, skipped)
        text = next((name for name in fields.needed if name in fields.texts), None) if self.joins(stage, head) else None
        identity += [stage, self.validation_share]
        share = self.validation_share
        measured = partial(self._size, read, text)
        return Reader(rows, lambda: cut(read, measured(), rows.key, share, stage, text), identity, skipped)

    def _size(self, read: Callable[[], Iterator[Item]], text: str | None) -> tuple[int, int]:
        """Return the size of the training rows, measured once for both of their parts."""
        if text not in self._sizes:
            self._sizes[text] = measure(read, text)
        return self._sizes[text]

    def _cut(self) -> bool:
        """Whether validation rows are taken from the training ones."""
        return self._given("validation") is None and self.validation_share > 0

    def _given(self, stage: Stage) -> Files:
        given = self.given[stage]
        if given is None and self.source is not None and stage in self.hub.splits:
            return stage
        return given

    def _rows(self, stage: Stage, chunks: bool) -> Rows:
        key, given = f"data.{stage}", self._given(stage)
        if given is None:
            raise UserError(Problem(key, "is not set, and this run needs it"))
        if self.source is None:
            return local(key, given, replace(self.options, chunks=chunks))
        if not isinstance(given, str):
            raise UserError(Problem(key, f"with data.source it is the name of a split, got {given}"))
        return self.hub.rows(key, given)


def _sharded(
    rows: Rows, fields: Fields, skipped: Skipped, shard: int = 0, shards: int = 1, skip: int = 0
) -> Iterator[Item]:
    if rows.sharded is not None:
        return fields.items(rows, rows.sharded(shard, shards), skipped)
    return islice(fields.items(rows, rows.read(), skipped), skip + shard, None, shards)


def _stat(file: str) -> list[Any]:
    info = os.stat(file)
    return [os.path.realpath(file), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
