"""Rows from Hugging Face ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from llmkit.data.rows import Bad, RawRows, Row, Source
from llmkit.errors import Problem, UserError, nearest


class Hub:
    """A data set that Hugging Face ``datasets`` loads: a name on the hub or a folder.

    Raises UserError, with the cause, when it cannot be loaded.
    """

    def __init__(self, source: str, subset: str | None, streaming: bool) -> None:
        self.source, self.subset, self.streaming = source, subset, streaming
        self._builder = _try(source, lambda datasets: datasets.load_dataset_builder(source, subset))
        self.splits = [str(name) for name in self._builder.info.splits or self._builder.config.data_files or {}]

    def rows(self, key: str, split: str) -> Source:
        """Return the rows of a split, or of a part or sum of splits (``train[:10%]``, ``train+test``)."""
        if split.partition("[")[0].partition("+")[0] not in self.splits:
            hint = f"{nearest(split, self.splits)} Splits: {', '.join(self.splits)}."
            if os.path.exists(split):
                hint += " It is a file: to read it, set data.source: null."
            raise UserError(Problem(key, f"'{self.source}' has no split '{split}'.{hint}"))
        read = partial(_read, key, self.source, self.subset, split, self.streaming)
        # The builder's hash covers the versions of the files (etags on the hub, times in a folder).
        identity = [self.source, self.subset, split, self._builder.config_id, self._builder.hash]
        return Source(key, [split], read, identity=identity, sharded=read if self.streaming else None)


def _try(source: str, load: Callable[[Any], Any]) -> Any:
    try:
        import datasets

        return load(datasets)
    except Exception as error:  # the library and what it stands on raise dozens of types
        raise UserError(Problem("data.source", f"'{source}' cannot be loaded: {_one_line(error)}")) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read(
    key: str, source: str, subset: str | None, split: str, streaming: bool, shard: int = 0, shards: int = 1
) -> RawRows:
    def load(datasets: Any) -> Any:
        data = datasets.load_dataset(source, subset, split=split, streaming=streaming)
        return datasets.distributed.split_dataset_by_node(data, shard, shards) if shards > 1 else data

    data = _try(source, load)
    # Numbers of classes become their names, which is what a prediction should say; in lists of them too.
    kinds = {name: getattr(kind, "feature", kind) for name, kind in (data.features or {}).items()}
    names = {name: kind.names for name, kind in kinds.items() if hasattr(kind, "names")}
    number = 0
    try:
        for number, item in enumerate(data, 1):
            try:
                named = {name: _named(item[name], names[name]) for name in names.keys() & item.keys()}
            except IndexError:
                yield Bad("has a class number that the data set has no name for", split, number)
            else:
                yield Row({**item, **named}, split, number)
    except Exception as error:
        text = f"'{source}' cannot be read after row {number} of '{split}': {_one_line(error)}"
        raise UserError(Problem(key, text)) from error


def _named(value: Any, names: list[str]) -> Any:
    """Return the class name of a number, or of each number of a list; -1 (no label) stays."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and value >= 0 else value
