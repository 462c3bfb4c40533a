"""Rows of local files: which files a setting names, how each is read, and parallel ones side by side."""

from __future__ import annotations

import glob
import os
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llmkit.data.formats import READERS, Format, Options, open_text
from llmkit.data.rows import Bad, Read, Row, Rows, flaw
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


def local(key: str, value: str | list[str] | dict[str, str], options: Options) -> Rows:
    """Return the rows of local files.

    Raises UserError for missing files. Reading raises it for files that cannot be read at all; bad rows are yielded.
    """
    if isinstance(value, dict):
        paths = {name: files_of(key, path) for name, path in value.items()}
        for name, files in paths.items():
            if len(files) != 1:
                raise UserError(
                    Problem(f"{key}.{name}", f"parallel files come one by field, '{value[name]}' gives {len(files)}")
                )
        columns = {name: files[0] for name, files in paths.items()}
        names = [Path(path).name for path in columns.values()]
        files = list(columns.values())
        read = partial(_parallel, key, columns, options)
        return Rows(key, names, read, files=files, identity=[list(columns), options.encoding])
    files = files_of(key, value)
    formats = [_format_of(path, options) for path in files]
    if "lines" in formats and options.pattern is None:
        raise UserError(Problem("data.format", "'lines' needs data.pattern, a regular expression with named groups"))

    single = all(format == "text" for format in formats)
    names = [Path(path).name for path in files]
    identity: list[Any] = [names, formats, options.pattern, options.column_names, options.encoding, options.chunks]
    return Rows(key, names, partial(_read, key, files, formats, options), single, files, identity)


def _format_of(path: str, options: Options) -> Format:
    if options.format != "auto":
        return options.format
    if options.pattern is not None:
        return "lines"
    return SUFFIXES.get(Path(path).suffix.lower(), "text")


def _read(key: str, files: list[str], formats: list[Format], options: Options) -> Read:
    for path, format in zip(files, formats, strict=True):
        yield from _guarded(key, path, READERS[format](path, options))


def _guarded(key: str, path: str, rows: Read) -> Read:
    """Yield the rows. Raises UserError, in one line, for whatever the reader raises."""
    try:
        yield from rows
    except (OSError, ValueError, LookupError, RecursionError) as error:
        text = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        raise UserError(Problem(key, " ".join(text.split()))) from error


def _parallel(key: str, columns: dict[str, str], options: Options) -> Read:
    return _guarded(key, ", ".join(columns.values()), _side_by_side(columns, options))


def _side_by_side(columns: dict[str, str], options: Options) -> Read:
    """Yield one row a line from files whose lines belong together; all of it is bad where one of its lines is."""
    paths = list(columns.values())
    with ExitStack() as stack:
        files = [stack.enter_context(open_text(path, options)) for path in paths]
        for number, lines in enumerate(zip_longest(*files), 1):
            if None in lines:
                told = ", ".join(f"{path}: {_num_lines(path, options)}" for path in paths)
                raise UserError(f"parallel files have unequal numbers of lines ({told})")
            data = {name: line.rstrip("\n") for name, line in zip(columns, lines, strict=True)}
            if flaw("".join(lines), options.encoding):
                flaws = [(flaw(line, options.encoding), path) for line, path in zip(lines, paths, strict=True)]
                yield next(Bad(wrong, path, number) for wrong, path in flaws if wrong)
            else:
                yield Row(data, paths[0], number)


def _num_lines(path: str, options: Options) -> int:
    with open_text(path, options) as file:
        return sum(1 for _ in file)
