"""Which rows belong to which stage, and how the head's fields are read from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from llmkit.contracts import Dataset, Head, Stage
from llmkit.data import cache
from llmkit.data.hub import Hub
from llmkit.data.opening import Options
from llmkit.data.parts import Shares, cut, limited, measure, numbered
from llmkit.data.prepare import Fields, Item, ReadItems
from llmkit.data.progress import Step
from llmkit.data.rows import OnBadRow, Skipped, Source
from llmkit.data.sources import Files, generated, local
from llmkit.data.stream import HELD_OUT, take
from llmkit.data.tokens import Ending
from llmkit.errors import Problem, UserError

Columns = dict[str, str | list[str] | dict[str, str | list[str]]]


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

    def cache_key(self, used: list[Any], *others: Any) -> str | None:
        """Return the name in the cache of what is made from the items with what is ``used``; None: it is not kept."""
        return None if None in (self.source.identity, *used) else cache.digest([*others, self.identity, used])

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

    given: dict[Stage, Files | Dataset]
    source: str | None
    subset: str | None
    options: Options
    on_bad_row: OnBadRow
    columns: Columns | None
    documents: Literal["file", "line", "every_line"]
    shares: Shares
    limits: dict[Stage, int]
    streaming: bool
    folder: Path
    _sizes: dict[Any, Any] = field(default_factory=dict, init=False)

    @cached_property
    def hub(self) -> Hub | None:
        """The data set that ``data.source`` names."""
        return None if self.source is None else Hub(self.source, self.subset, self.streaming)

    def has(self, stage: Stage) -> bool:
        """Whether there are rows for a stage."""
        return self._given(stage) is not None or (stage in self._parts()[1:] and self.has("train"))

    def reader(self, stage: Stage, head: Head) -> Reader:
        """Return the reader of a stage. Raises UserError when nothing is configured or files are missing."""
        whole, every = self.documents == "file", self.documents == "every_line"
        joined = head.layout == "blocks" and stage != "predict"
        shares = self._shares()
        part = stage in self._parts()
        given: Stage = "train" if part else stage
        source = self._source(given, chunks=joined and whole, blanks=stage == "predict" or (joined and every))
        joins = Ending(int(source.single and not whole), every) if joined else None
        fields = Fields.of(head, self._columns(given), stage == "predict", source)
        columns = [(name, column, name in fields.texts) for name, column in fields.columns.items()]
        # Files of a stream are too large to be read for a hash.
        files = [_stat(file) if self.streaming else cache.file_digest(file, self.folder) for file in source.files]
        identity: list[Any] = [files, source.identity, columns, self.on_bad_row]
        skipped = Skipped(source.key, self.on_bad_row)
        if part:
            source = replace(source, sharded=None)  # the rows set aside are the first of the whole, not of a shard
        read: Callable[..., Iterator[Item]] = partial(_sharded, source, fields, skipped)
        if part and self.streaming:
            return self._part_of_a_stream(stage, source, read, identity, joins, skipped)
        if part:
            text = next((name for name in fields.columns if name in fields.texts), None) if joins else None
            identity += [stage, astuple(shares), text is not None, head.classes]
            read = partial(self._part, read, source.key, shares, stage, text, head.classes)
        if stage in self.limits:
            identity.append(self.limits[stage])
            read = partial(self._limited, read, stage, joined)
        return Reader(source, read, identity, joins, skipped)

    def _part(
        self, read: ReadItems, key: str, shares: Shares, stage: Stage, text: str | None, classes: tuple[str, ...]
    ) -> Iterator[Item]:
        fields = (text, classes)
        if fields not in self._sizes:  # measured once for all parts
            with Step(f"counting {key}") as step:
                self._sizes[fields] = measure(lambda: step.counted(read()), text, classes)
        return cut(read, self._sizes[fields], key, shares, stage, text)

    def _limited(self, read: Callable[[], Iterator[Item]], stage: Stage, joins: bool) -> Iterator[Item]:
        key = ("limit", stage, joins)
        if key not in self._sizes:
            with Step(f"counting data.{stage}") as step:
                self._sizes[key] = 1 + max((n for n, _ in step.counted(numbered(read, joins))), default=-1)
        return limited(read, self._sizes[key], self.limits[stage], joins)

    @staticmethod
    def _part_of_a_stream(
        stage: Stage, source: Source, read: Any, identity: list[Any], joins: Ending | None, skipped: Skipped
    ) -> Reader:
        identity += [stage, HELD_OUT]
        if stage == "validation":
            return Reader(source, lambda: take(read(), HELD_OUT), identity, joins, skipped)
        size = sum(1 for _ in take(read(), HELD_OUT))
        if size and next(read(skip=size), None) is None:
            text = f"all {size} rows would be set aside for validation. Set data.validation."
            raise UserError(Problem(source.key, text))
        return Reader(source, partial(read, skip=size), identity, joins, skipped)

    def _columns(self, stage: Stage) -> dict[str, str | list[str]]:
        """Return the columns of a stage: those of all stages, and those that are given for this one."""
        found: dict[str, str | list[str]] = {}
        own: dict[str, str | list[str]] = {}
        for name, value in (self.columns or {}).items():
            if not isinstance(value, dict):
                found[name] = value
            elif name not in get_args(Stage):
                text = f"a mapping is for a split ({', '.join(get_args(Stage))}), '{name}' is none"
                raise UserError(Problem("data.columns", text))
            elif name == stage:
                own = value
        return found | own

    def _shares(self) -> Shares:
        """Return the shares of ``train`` that are in use."""
        return self.shares if self._given("validation") is None else replace(self.shares, validation=0.0)

    def _parts(self) -> tuple[Stage, ...]:
        """Return the stages that share the rows of ``train``, itself first; none if it is not shared."""
        shares = self._shares()
        found: list[Stage] = ["validation"] if shares.validation else []
        found += ["test"] if self.shares.cut_test else []
        return ("train", *found) if found else ()

    def _given(self, stage: Stage) -> Files | Dataset:
        given = self.given[stage]
        if stage == "test" and self.shares.cut_test:
            return None
        return stage if given is None and self.hub is not None and stage in self.hub.splits else given

    def _source(self, stage: Stage, chunks: bool, blanks: bool) -> Source:
        key, given = f"data.{stage}", self._given(stage)
        if given is None:
            raise UserError(Problem(key, "is not set, and this run needs it"))
        if isinstance(given, Dataset):
            return generated(key, given, stage, self.folder)
        if self.hub is None:
            return local(key, given, replace(self.options, chunks=chunks, blanks=blanks))
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
