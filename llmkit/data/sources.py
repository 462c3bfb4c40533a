"""Rows of local files: which files a setting names, how each is read, and parallel files line by line."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.contracts import Dataset, Stage
from llmkit.data import identity
from llmkit.data.formats import READERS
from llmkit.data.opening import UNREADABLE, Format, Options, inner_name, lines, shortened
from llmkit.data.rows import Bad, RawRows, Row, Source, flaw
from llmkit.errors import Problem, UserError, blame, returned

Files = str | list[str] | dict[str, Any] | None

SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
}  # fmt: skip


def files_of(key: str, value: str | list[str]) -> list[str]:
    """Return the sorted files of paths and glob patterns, each once however it is spelled.

    Raises UserError when one matches nothing.
    """
    found: dict[tuple[int, int], str] = {}  # by device and inode: of two links, too, one would be trained on the other
    for path in [value] if isinstance(value, str) else value:
        path = os.path.expanduser(path)
        matches = [path] if os.path.isfile(path) else [m for m in glob.glob(path, recursive=True) if os.path.isfile(m)]
        if not matches:
            raise UserError(Problem(key, _no_file(path)))
        for match in matches:
            info = os.stat(match)
            found.setdefault((info.st_dev, info.st_ino), match)
    return sorted(found.values())


def _no_file(path: str) -> str:
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name)))
        inside = f"; '{os.path.join(path, '*')}' reads its files ({shortened(names)})" if names else " without files"
        return f"'{path}' is a folder{inside}"
    return f"no file '{path}'{_data_hint(path)}"


def _data_hint(path: str) -> str:
    folder = os.environ.get("LLMKIT_DATA", "../shared/data")
    if os.path.isdir(folder) or not os.path.abspath(path).startswith(os.path.abspath(folder)):
        return ""
    return (
        ". The folder named by the environment variable LLMKIT_DATA (default ../shared/data) is missing; "
        "the config's comments say how to get the data"
    )


def with_arguments_of_train(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of data with each split whole that says only what is other than in a generated ``train``.

    ``{train: {name: mqar, pairs: 8}, validation: {length: 256}}`` validates on ``{name: mqar, pairs: 8, length: 256}``.
    """
    found = dict(data)
    if registry.family_at("data.train", data.get("train")):
        with suppress(UserError):  # which is reported for ``train`` itself
            train = registry.expand("dataset", data["train"])
            for split, value in data.items():
                key = f"data.{split}"
                if key in registry.DATASETS and isinstance(value, Mapping) and not registry.family_at(key, value):
                    own = value.get("init_args", value)
                    found[split] = {**train, "init_args": {**(train.get("init_args") or {}), **own}}
    return found


def datasets(splits: Mapping[str, Files]) -> dict[Stage, Files | Dataset]:
    """Return what is given for each split, with the plugins among it built."""
    found: dict[Any, Files | Dataset] = {}
    for split, value in with_arguments_of_train(splits).items():
        key = f"data.{split}"
        with blame(key):
            found[split] = registry.resolve("dataset", value)() if registry.family_at(key, value) else value
    return found


def generated(key: str, dataset: Dataset, split: Stage, folder: Path) -> Source:
    """Return the rows that a data set makes for a split; they are kept in the cache if its code can be described."""
    name = type(dataset).__name__

    def read() -> RawRows:
        for number, row in enumerate(dataset.rows(split), 1):
            if not isinstance(row, Mapping):
                raise returned(dataset, "rows", row, "mappings from columns to values")
            yield Row(row, name, number)

    described = identity.of(dataset, folder)
    return Source(key, [name], read, identity=described and [described, split])


def local(key: str, value: str | list[str] | dict[str, Any], options: Options) -> Source:
    """Return the rows of local files.

    Raises UserError for missing files. Reading raises it for files that cannot be read at all; bad rows are yielded.
    """
    readers: dict[str, Callable[[], RawRows]]
    if isinstance(value, dict):
        columns: dict[str, str] = {}
        for name, path in value.items():
            if not isinstance(path, str):
                raise UserError(Problem(f"{key}.{name}", f"expected a file, got {path!r}"))
            files = files_of(key, path)
            if len(files) != 1:
                text = f"parallel files are given one per field, but '{path}' matches {len(files)}"
                raise UserError(Problem(f"{key}.{name}", text))
            columns[name] = files[0]
        files = list(columns.values())
        readers = {", ".join(files): partial(_parallel, columns, options)}
        formats: list[Format] = []
        identity: list[Any] = [list(columns), options.encoding]
    else:
        files = files_of(key, value)
        formats = [_format_of(key, path, options) for path in files]
        if "lines" in formats and options.pattern is None:
            text = "'lines' needs data.pattern, a regular expression with named groups"
            raise UserError(Problem("data.format", text))
        # Of other splits it is that of the training data: a CSV file may be followed by texts to predict.
        if options.delimiter is not None and key == "data.train" and "csv" not in formats:
            text = f"is for files of format csv, and {shortened(files)} are read as {', '.join(sorted(set(formats)))}"
            raise UserError(Problem("data.delimiter", text))
        readers = {path: partial(READERS[fmt], path, options) for path, fmt in zip(files, formats, strict=True)}
        identity = [formats, astuple(options)]
    names = [Path(path).name for path in files]
    advice = ""
    if {"csv", "tsv"} & set(formats) and options.column_names is None:
        advice = " For a file without a header data.column_names names all of them."
    if options.pattern is not None and not {"lines", "conll"} & set(formats):
        advice += f" data.pattern is not used for {formats[0]}; data.format: lines reads any file by it."
    single = set(formats) == {"text"}
    return Source(key, names, partial(_read, key, readers), single, files, [names, *identity], advice=advice)


def _format_of(key: str, path: str, options: Options) -> Format:
    """Return the format of a file: the one that is set, or by its suffix, or lines if there is a pattern."""
    if options.format != "auto":
        return options.format
    with _reported(key, path):
        suffix = Path(inner_name(path)).suffix.lower()
    return SUFFIXES.get(suffix, "text" if options.pattern is None else "lines")


def _read(key: str, readers: dict[str, Callable[[], RawRows]]) -> RawRows:
    """Yield the rows of each file. Raises UserError, in one line, for whatever a reader raises."""
    for path, reader in readers.items():
        with _reported(key, path):
            yield from reader()


@contextmanager
def _reported(key: str, path: str) -> Iterator[None]:
    """Raise UserError, in one line, for what is raised because of a file."""
    try:
        yield
    except UNREADABLE as error:
        text = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        raise UserError(Problem(key, " ".join(text.split()))) from error


def _parallel(columns: dict[str, str], options: Options) -> RawRows:
    """Yield a row for each line of files whose lines belong together; it is bad if any of its lines is."""
    paths = list(columns.values())
    for number, parts in enumerate(zip_longest(*(lines(path, options) for path in paths)), 1):
        if None in parts:
            counts = ", ".join(f"{path}: {sum(1 for _ in lines(path, options))}" for path in paths)
            raise UserError(f"parallel files have unequal numbers of lines ({counts})")
        flaws = ((flaw(line, options.encoding), path) for line, path in zip(parts, paths, strict=True))
        bad = next((Bad(wrong, path, number) for wrong, path in flaws if wrong), None)
        yield bad or Row(dict(zip(columns, parts, strict=True)), paths[0], number)
