"""Readers of file formats: each yields rows, and in their place those that are bad.

A file that cannot be read as what it should be (JSON that ends in the middle, garbage in Parquet) raises UserError.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import count, groupby
from typing import Any, Literal

from llmkit.data.rows import Bad, Read, Row, flaw
from llmkit.errors import Problem, UserError

Format = Literal["auto", "text", "csv", "tsv", "json", "parquet", "lines", "conll", "squad"]

CHUNK = 256 * 1024  # characters of a large text that are read as one row
WRONG_BYTES = "llmkit.wrong_bytes"

# Bytes that are not of the encoding become a lone surrogate, which no text holds: `flaw` finds it.
codecs.register_error(WRONG_BYTES, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Options:
    """How files are read; see the arguments of the same names of ``DataModule``."""

    format: Format = "auto"
    pattern: str | None = None
    column_names: list[str] | None = None
    encoding: str = "utf-8"
    chunks: bool = False  # a text file is one document, in chunks; otherwise each non-empty line is a row


def open_text(path: str, options: Options, newline: str | None = None) -> Any:
    """Open a text file whose wrong bytes are for ``flaw`` to find."""
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    return open(path, encoding=encoding, errors=WRONG_BYTES, newline=newline)


def _numbered(path: str, options: Options) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number of each line, the line and what is wrong with its characters."""
    with open_text(path, options) as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\n"), flaw(line, options.encoding)


def _text(path: str, options: Options) -> Read:
    if options.chunks:
        yield from _chunks(path, options)
        return
    for number, line, wrong in _numbered(path, options):
        if wrong:
            yield Bad(wrong, path, number)
        elif line.strip():
            yield Row({"text": line}, path, number)


def _chunks(path: str, options: Options) -> Read:
    """Yield the text in large pieces; bad lines are left out of them."""
    with open_text(path, options) as file:
        number, first = 1, True
        # Cut at a line's end, but do not look for it forever.
        while chunk := file.read(CHUNK) + file.readline(CHUNK):
            lines = chunk.count("\n")
            if flaw(chunk):
                good = []
                for place, line in enumerate(StringIO(chunk), number):
                    wrong = flaw(line, options.encoding)
                    if wrong:
                        yield Bad(wrong, path, place)
                    else:
                        good.append(line)
                chunk = "".join(good)
            if chunk:
                yield Row({"text": chunk}, path, number, first, chunk.count("\n") or 1)
                first = False
            number += lines


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(Problem("data.pattern", f"is not a regular expression: {error}")) from error
    if not compiled.groupindex:
        raise UserError(Problem("data.pattern", "has no named group; a column is written (?P<name>...)"))
    return compiled


def _lines(path: str, options: Options) -> Read:
    pattern = _compiled(options.pattern or "")
    for number, line, wrong in _numbered(path, options):
        if line.strip():
            match = pattern.fullmatch(line)
            if wrong or match is None:
                yield Bad(wrong or f"does not match data.pattern: {line.strip()[:60]!r}", path, number)
            else:
                yield Row(match.groupdict(), path, number)


def _conll(path: str, options: Options) -> Read:
    """Yield sentences: blocks of lines, a word with its columns on each, that empty lines divide."""
    match = _compiled(options.pattern).fullmatch if options.pattern else _word_and_tag
    widths: set[int] = set()  # numbers of fields that lines of words have
    for empty, block in groupby(_numbered(path, options), lambda numbered: not numbered[1].strip()):
        if empty:
            continue
        lines = [numbered for numbered in block if not numbered[1].startswith("-DOCSTART-")]
        widths.update(_num_fields(line) for _, line, _ in lines if not line.startswith("#"))
        words: list[tuple[int, dict[str, str | None]]] = []
        bad = None
        for number, line, wrong in lines:
            found = match(line)
            # A word may be '#': such a line is a comment only where it does not look like the others.
            if line.startswith("#") and (found is None or not (options.pattern or _num_fields(line) in widths)):
                continue
            if wrong or found is None:
                what = "does not match data.pattern" if options.pattern else "does not begin with a word"
                bad = Bad(wrong or f"{what}: {line[:60]!r}", path, number)
                break
            words.append((number, found.groupdict()))
        if bad:
            yield bad
        elif words:
            yield _sentence(path, words)


def _word_and_tag(line: str) -> re.Match[str] | None:
    """Return the first and the last field, which are divided by tabs where there is one, else by blanks."""
    return _BY_TABS.fullmatch(line) or _BY_BLANKS.fullmatch(line)


_BY_TABS = re.compile(r"(?P<tokens>[^\t]+)\t(?:.*\t)? *(?P<tags>\S+)\s*")
_BY_BLANKS = re.compile(r"(?P<tokens>\S+)(?:\s(?:.*\s)?(?P<tags>\S+))?\s*")


def _num_fields(line: str) -> int:
    return len(line.split("\t") if "\t" in line else line.split())


def _sentence(path: str, words: list[tuple[int, dict[str, str | None]]]) -> Row | Bad:
    """Return the columns of a sentence; one that no line has (words without tags, say) is left out."""
    data: dict[str, list[str]] = {}
    for name in words[0][1]:
        if all(columns[name] is None for _, columns in words):
            continue
        data[name] = []
        for number, columns in words:
            value = columns[name]
            if value is None:
                return Bad(f"has no '{name}', other lines of the sentence have", path, number)
            data[name].append(value)
    return Row(data, path, words[0][0])


def _table(path: str, options: Options, dialect: Mapping[str, Any]) -> Read:
    """Yield rows of a table with a header, or without one where the column names are given; cells stay strings."""
    csv.field_size_limit(2**31 - 1)
    header = options.column_names
    with open_text(path, options, newline="") as file:
        for number, cells, wrong in _records(file, dialect):
            wrong = flaw("".join(cells), options.encoding) or wrong
            if header is None:
                if wrong:
                    raise UserError(f"{path}:{number} {wrong}")
                header = cells
            elif wrong or len(cells) != len(header):
                told = f"has {len(cells)} cells, expected {len(header)}: {shortened(header)}"
                yield Bad(wrong or told, path, number)
            else:
                yield Row(dict(zip(header, cells, strict=True)), path, number)


def _records(lines: Iterable[str], dialect: Mapping[str, Any]) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield the first line of each record that is not empty, its cells, and what is wrong with it."""
    taken: list[str] = []  # lines of the record at hand
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
            # Each of the lines after it is a record of its own: a quotation mark would have closed the first one's.
            for after, line in enumerate(taken[1:], number + 1):
                if line.strip():
                    try:
                        yield after, next(csv.reader([line], strict=True, **dialect)), None
                    except csv.Error as wrong:
                        yield after, [], f"is not CSV: {wrong}"
        else:
            if cells:
                yield number, cells, None


def _csv(path: str, options: Options) -> Read:
    return _table(path, options, {})


def _tsv(path: str, options: Options) -> Read:
    # In tab-separated files a quotation mark is text.
    return _table(path, options, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _json(path: str, options: Options) -> Read:
    """Yield objects, one a line or from one list."""
    with open_text(path, options) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start == "[":
        for number, item in enumerate(_document(path, options), 1):
            yield _object(item, path, number)
        return
    for number, line, wrong in _numbered(path, options):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            expected = ". Expected one object a line, or one list of objects; for SQuAD's files set data.format: squad"
            wrong = wrong or f"is not JSON: {_cause(error)}{expected if number == 1 else ''}"
        yield Bad(wrong, path, number) if wrong else _object(item, path, number)


def _object(item: Any, path: str, number: int) -> Row | Bad:
    if isinstance(item, dict):
        return Row(item, path, number)
    return Bad(f"holds {type(item).__name__}, expected an object", path, number)


def _document(path: str, options: Options) -> Any:
    """Return what a whole file of JSON holds. Raises UserError, with the line, when it is none."""
    with open_text(path, options) as file:
        text = file.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        wrong = flaw(text.split("\n")[error.lineno - 1], options.encoding) or f"is not JSON: {error.msg}"
        raise UserError(f"{path}:{error.lineno} {wrong}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)  # a number of too many digits


def _squad(path: str, options: Options) -> Read:
    """Yield the questions of a SQuAD file (v1.1, or v2.0 with unanswerable ones); each paragraph is a document."""
    content = _document(path, options)
    try:
        articles = _part(content, "data", list)
    except _MalformedError as error:
        raise UserError(f"{path}: expected SQuAD's format, but the file {error}") from error
    numbers = count(1)
    for a, article in enumerate(articles):
        place = f"data[{a}]"
        try:
            paragraphs = _part(article, "paragraphs", list)
        except _MalformedError as error:
            yield Bad(f"({place}) {error}", path, next(numbers))
            continue
        title = article.get("title", "")
        for p, paragraph in enumerate(paragraphs):
            place = f"data[{a}].paragraphs[{p}]"
            try:
                context, entries = _part(paragraph, "context", str), _part(paragraph, "qas", list)
            except _MalformedError as error:
                yield Bad(f"({place}) {error}", path, next(numbers))
                continue
            first = True
            for q, (entry, number) in enumerate(zip(entries, numbers, strict=False)):
                try:
                    row = _question(entry, number)
                except _MalformedError as error:
                    yield Bad(f"({place}.qas[{q}]) {error}", path, number)
                    continue
                row |= {"title": title if isinstance(title, str) else "", "context": context}
                yield Row(row, path, number, first)
                first = False


class _MalformedError(Exception):
    """A part of a SQuAD file that is not what it should be."""


def _part(parent: Any, key: str, kind: type) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _MalformedError(f"has no {kind.__name__} '{key}'")
    return value


def _question(entry: Any, number: int) -> dict[str, Any]:
    """Return the columns of a question that are its own."""
    row: dict[str, Any] = {"question": _part(entry, "question", str)}
    name = entry.get("id")
    row["id"] = str(name if isinstance(name, str | int) else number)
    if "answers" in entry:  # there are none where they are to be predicted
        answers = _part(entry, "answers", list)
        row["answers"] = {
            "text": [_part(answer, "text", str) for answer in answers],
            "answer_start": [_part(answer, "answer_start", int) for answer in answers],
        }
    return row


def _parquet(path: str, options: Options) -> Read:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for item in _batch_rows(batch):
                    number += 1
                    yield Bad(item, path, number) if isinstance(item, str) else Row(item, path, number)
    except Exception as error:  # damage shows in dozens of ways
        place = f"{path}, after row {number}" if number else path
        raise UserError(f"{place}: {type(error).__name__}: {str(error)[:200]}") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch of Arrow data, or what is wrong with one (bytes that are not UTF-8, say)."""
    try:
        yield from batch.to_pylist()
    except Exception:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except Exception as error:
                yield f"cannot be read: {type(error).__name__}: {error}"


def shortened(names: Iterable[str]) -> str:
    """Return names in a list that fits into a message."""
    told = ", ".join(names)
    return told if len(told) <= 200 else f"{told[:200]}..."


READERS: dict[str, Callable[[str, Options], Read]] = {
    "text": _text, "lines": _lines, "csv": _csv, "tsv": _tsv, "json": _json, "parquet": _parquet,
    "conll": _conll, "squad": _squad,
}  # fmt: skip
