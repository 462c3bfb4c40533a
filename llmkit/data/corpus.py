"""Which rows belong to which stage, and how the head's fields are read from them."""

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
from llmkit.data.rows import OnBadRow, Skipped, Source
from llmkit.data.sources import Files, local
from llmkit.data.stream import HELD_OUT, take
from llmkit.data.tokens import Ending
from llmkit.errors import Problem, UserError


class Reader(NamedTuple):
    """Reads the items of a stage, any number of times."""

    source: Source
    read: Callable[..., Iterator[Item]]
    """Takes (shard, number of shards) for training data; without arguments it reads everything."""
    identity: list[Any]
    """Changes whenever the items may have changed; part of the keys of the cache."""
    joins: Ending | None
    """How documents end where the items become one stream of tokens; None: they do not."""
    skipped: Skipped
    """The bad rows of the latest pass."""

    def check(self) -> None:
        """Raise UserError when there are no rows, or only bad ones."""
        if next(self.read(), None) is None:
            raise self.empty(self.skipped)

    def empty(self, skipped: Skipped) -> UserError:
        """Return the error for a split without rows: the source has none, or all were ``skipped``."""
        summary = skipped.summary(self.skipped.seen)
        because = f": {summary}" if summary else ""
        return UserError(Problem(self.source.key, f"no rows in {', '.join(self.source.names)}{because}"))


@dataclass
class Corpus:
    """The rows of all stages. Its arguments are those of ``DataModule``."""

    given: dict[Stage, Files]
    source: str | None
    subset: str | None
    options: Options
    on_bad_row: OnBadRow
    columns: dict[str, str] | None
    documents: Literal["file", "line", "every_line"]
    validation_share: float
    streaming: bool
    folder: Path
    _sizes: dict[str | None, tuple[int, int]] = field(default_factory=dict, init=False)

    @cached_property
    def hub(self) -> Hub | None:
        """The data set that ``data.source`` names."""
        return None if self.source is None else Hub(self.source, self.subset, self.streaming)

    def has(self, stage: Stage) -> bool:
        """Whether there are rows for a stage."""
        return self._given(stage) is not None or (stage == "validation" and self._shared() and self.has("train"))

    def reader(self, stage: Stage, head: Head) -> Reader:
        """Return the reader of a stage. Raises UserError when nothing is configured or files are missing."""
        whole, blank = self.documents == "file", self.documents == "every_line"
        joined = head.layout == "blocks" and stage != "predict"
        part = self._shared() and stage in ("train", "validation")
        source = self._source("train" if part else stage, chunks=joined and whole, blank=joined and blank)
        joins = Ending(int(source.single and not whole), blank) if joined else None
        fields = Fields.of(head, self.columns or {}, stage == "predict", source.single)
        columns = [(name, column, name in fields.texts) for name, column in fields.columns.items()]
        # Files of a stream are too large to be read for a hash.
        files = [_stat(file) if self.streaming else cache.file_digest(file, self.folder) for file in source.files]
        identity: list[Any] = [files, source.identity, columns, self.on_bad_row]
        skipped = Skipped(source.key, self.on_bad_row)
        if not part:
            return Reader(source, partial(_sharded, source, fields, skipped), identity, joins, skipped)
        source = replace(source, sharded=None)  # the rows set aside are the first of the whole, not of a shard
        read = partial(_sharded, source, fields, skipped)
        if not self.streaming:
            share = self.validation_share
            text = next((name for name in fields.columns if name in fields.texts), None) if joins else None

            def read_part() -> Iterator[Item]:
                if text not in self._sizes:  # measured once for both parts
                    self._sizes[text] = measure(read, text)
                return cut(read, self._sizes[text], source.key, share, stage, text)

            return Reader(source, read_part, [*identity, stage, share], joins, skipped)
        identity += [stage, HELD_OUT]
        if stage == "validation":
            return Reader(source, lambda: take(read(), HELD_OUT), identity, joins, skipped)
        size = sum(1 for _ in take(read(), HELD_OUT))
        if size and next(read(skip=size), None) is None:
            text = f"all {size} rows would be set aside for validation. Set data.validation."
            raise UserError(Problem(source.key, text))
        return Reader(source, partial(read, skip=size), identity, joins, skipped)

    def _shared(self) -> bool:
        """Whether the rows of ``train`` are shared between training and validation."""
        return self._given("validation") is None and self.validation_share > 0

    def _given(self, stage: Stage) -> Files:
        given = self.given[stage]
        return stage if given is None and self.hub is not None and stage in self.hub.splits else given

    def _source(self, stage: Stage, chunks: bool, blank: bool) -> Source:
        key, given = f"data.{stage}", self._given(stage)
        if given is None:
            raise UserError(Problem(key, "is not set, and this run needs it"))
        if self.hub is None:
            return local(key, given, replace(self.options, chunks=chunks, blank=blank))
        if not isinstance(given, str):
            raise UserError(Problem(key, f"with data.source it is the name of a split, got {given}"))
        return self.hub.rows(key, given)


def _sharded(
    source: Source, fields: Fields, skipped: Skipped, shard: int = 0, shards: int = 1, skip: int = 0
) -> Iterator[Item]:
    """Yield every item of a shard: the source's own shard, or one in ``shards`` items after the first ``skip``."""
    if source.sharded is not None:
        return fields.items(source.sharded(shard, shards), skipped)
    return islice(fields.items(source.read(), skipped), skip + shard, None, shards)


def _stat(file: str) -> list[Any]:
    info = os.stat(file)
    return [os.path.realpath(file), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
