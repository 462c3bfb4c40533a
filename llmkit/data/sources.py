"""Rows of local files: which files a setting names, how each is read, and parallel files line by line."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llmkit.data.formats import READERS, Format, Options, open_text
from llmkit.data.rows import Bad, RawRows, Row, Source, flaw
from llmkit.errors import Problem, UserError

Files = str | list[str] | dict[str, str] | None

SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
}  # fmt: skip


def files_of(key: str, value: str | list[str]) -> list[str]:
    """Return the sorted files of paths and glob patterns. Raises UserError when one matches nothing."""
    found: set[str] = set()
    for path in [value] if isinstance(value, str) else value:
        path = os.path.expanduser(path)
        matches = [path] if os.path.isfile(path) else [m for m in glob.glob(path, recursive=True) if os.path.isfile(m)]
        if not matches:
            raise UserError(Problem(key, f"no file '{path}'{_data_hint(path)}"))
        found.update(matches)
    return sorted(found)


def _data_hint(path: str) -> str:
    folder = os.environ.get("LLMKIT_DATA", "../shared/data")
    if os.path.isdir(folder) or not os.path.abspath(path).startswith(os.path.abspath(folder)):
        return ""
    return (
        ". The folder named by the environment variable LLMKIT_DATA (default ../shared/data) is missing; "
        "the config's comments say how to get the data"
    )


def local(key: str, value: str | list[str] | dict[str, str], options: Options) -> Source:
    """Return the rows of local files.

    Raises UserError for missing files. Reading raises it for files that cannot be read at all; bad rows are yielded.
    """
    readers: dict[str, Callable[[], RawRows]]
    if isinstance(value, dict):
        columns: dict[str, str] = {}
        for name, path in value.items():
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
        formats = [_format_of(path, options) for path in files]
        if "lines" in formats and options.pattern is None:
            text = "'lines' needs data.pattern, a regular expression with named groups"
            raise UserError(Problem("data.format", text))
        readers = {path: partial(READERS[fmt], path, options) for path, fmt in zip(files, formats, strict=True)}
        identity = [formats, options.pattern, options.column_names, options.encoding, options.chunks, options.blank]
    names = [Path(path).name for path in files]
    return Source(key, names, partial(_read, key, readers), set(formats) == {"text"}, files, [names, *identity])


def _format_of(path: str, options: Options) -> Format:
    if options.format != "auto":
        return options.format
    if options.pattern is not None:
        return "lines"
    return SUFFIXES.get(Path(path).suffix.lower(), "text")


def _read(key: str, readers: dict[str, Callable[[], RawRows]]) -> RawRows:
    """Yield the rows of each file. Raises UserError, in one line, for whatever a reader raises."""
    for path, reader in readers.items():
        try:
            yield from reader()
        except (OSError, ValueError, LookupError, RecursionError) as error:
            text = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
            raise UserError(Problem(key, " ".join(text.split()))) from error


def _parallel(columns: dict[str, str], options: Options) -> RawRows:
    """Yield a row for each line of files whose lines belong together; it is bad if any of its lines is."""
    paths = list(columns.values())
    with ExitStack() as stack:
        files = [stack.enter_context(open_text(path, options)) for path in paths]
        for number, lines in enumerate(zip_longest(*files), 1):
            if None in lines:
                counts = ", ".join(f"{path}: {_num_lines(path, options)}" for path in paths)
                raise UserError(f"parallel files have unequal numbers of lines ({counts})")
            flaws = ((flaw(line, options.encoding), path) for line, path in zip(lines, paths, strict=True))
            bad = next((Bad(wrong, path, number) for wrong, path in flaws if wrong), None)
            data = {name: line.rstrip("\n") for name, line in zip(columns, lines, strict=True)}
            yield bad or Row(data, paths[0], number)


def _num_lines(path: str, options: Options) -> int:
    with open_text(path, options) as file:
        return sum(1 for _ in file)
