"""Rows of tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmkit.data.opening import Options, open_text, shortened
from llmkit.data.rows import REPEATED, Bad, RawRows, Row, flaw
from llmkit.errors import UserError


def _repeated(names: list[str]) -> dict[str, Any]:
    """Return the columns that a header names more than once: which of them is meant is not known."""
    return {name: REPEATED for name in names if names.count(name) > 1}


def table_rows(path: str, options: Options, dialect: Mapping[str, Any]) -> RawRows:
    """Yield the rows of a table, whose first record is the header unless column names are given.

    An empty line is an empty cell of a table with a single column, and a row with ``options.blanks``. A table of more
    columns has no record there, as for other readers of CSV.
    """
    if options.delimiter is not None and "delimiter" not in dialect:
        dialect = {**dialect, "delimiter": options.delimiter}
    csv.field_size_limit(2**31 - 1)
    header = options.column_names
    repeated: dict[str, Any] = {}
    with open_text(path, options, newline="") as file:
        for number, cells, wrong in _records(file, dialect):
            if not (cells or wrong):
                if options.blanks and header and len(header) == 1:
                    yield Row({header[0]: ""}, path, number)
                continue
            wrong = flaw("".join(cells), options.encoding) or wrong
            if header is None:
                if wrong:
                    raise UserError(f"{path}:{number} {wrong}")
                header = cells
                other = next((mark for mark in ";\t|" if mark in header[0]), "") if len(header) == 1 else ""
                if other and options.delimiter is None:
                    advice = "data.format: tsv" if other == "\t" else f"data.delimiter: '{other}'"
                    raise UserError(f"{path}:{number} has one column, {header[0]!r}. Set {advice}")
                repeated = _repeated(header)
            elif wrong or len(cells) != len(header):
                yield Bad(wrong or f"has {len(cells)} cells, expected {len(header)}: {shortened(header)}", path, number)
            else:
                yield Row(dict(zip(header, cells, strict=True)) | repeated, path, number)


def _records(lines: Iterable[str], dialect: Mapping[str, Any]) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield the number of each record's first line, its cells (none of an empty line), and what is wrong with it.

    A quotation mark that is never closed makes one record of the rest of the file. Such a record is bad, but the lines
    after its first are read again, each as a record of its own, so that one stray mark does not lose them all.
    """
    taken: list[str] = []  # lines of the current record
    ended = False

    def kept() -> Iterator[str]:
        nonlocal ended
        for line in lines:
            taken.append(line)
            yield line
        ended = True

    reader = csv.reader(kept(), strict=True, **dialect)
    while not ended:
        number = reader.line_num + 1
        taken.clear()
        try:
            cells = next(reader, [])
        except csv.Error as error:
            if not ended:
                span = f" (up to line {reader.line_num})" if len(taken) > 1 else ""
                yield number, [], f"is not CSV: {error}{span}"
                continue
            yield number, [], "opens a quotation mark that is not closed"
            for after, line in enumerate(taken[1:], number + 1):
                if line.strip():
                    try:
                        yield after, next(csv.reader([line], strict=True, **dialect)), None
                    except csv.Error as wrong:
                        yield after, [], f"is not CSV: {wrong}"
        else:
            if cells or not ended:
                yield number, cells, None


def parquet_rows(path: str, options: Options) -> RawRows:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            repeated = _repeated(file.schema_arrow.names)
            for batch in file.iter_batches():
                for item in _batch_rows(batch):
                    number += 1
                    yield Bad(item, path, number) if isinstance(item, str) else Row(item | repeated, path, number)
    except Exception as error:  # a damaged file raises dozens of types
        place = f"{path}, after row {number}" if number else path
        raise UserError(f"{place}: {type(error).__name__}: {str(error)[:200]}") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch of Arrow data, or what is wrong with one (invalid UTF-8)."""
    try:
        yield from batch.to_pylist()
    except Exception:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except Exception as error:
                yield f"cannot be read: {type(error).__name__}: {error}"
