"""Readers of file formats: each yields the rows of a file, with a ``Bad`` in place of each row that cannot be used.

A file that cannot be read as a whole (JSON that ends in the middle, damaged Parquet) raises UserError.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import count, groupby
from typing import Any, Literal

from llmkit.data.rows import Bad, RawRows, Row, flaw
from llmkit.errors import Problem, UserError

Format = Literal["auto", "text", "csv", "tsv", "json", "parquet", "lines", "conll", "squad"]

CHUNK = 256 * 1024  # characters of a large text that are read as one row
WRONG_BYTES = "llmkit.wrong_bytes"

# Bytes that are invalid in the encoding become a lone surrogate, which valid text never holds: `flaw` finds it.
codecs.register_error(WRONG_BYTES, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Options:
    """How files are read; see the arguments of the same names of ``DataModule``."""

    format: Format = "auto"
    pattern: str | None = None
    column_names: list[str] | None = None
    encoding: str = "utf-8"
    chunks: bool = False  # a text file is one document, read in chunks; otherwise each non-empty line is a row
    blank: bool = False  # and each empty line too

    def __post_init__(self) -> None:
        """Raise UserError for an invalid pattern."""
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise UserError(Problem("data.pattern", f"is not a regular expression: {error}")) from error
            if not groups:
                raise UserError(Problem("data.pattern", "has no named group; a column is written (?P<name>...)"))


def open_text(path: str, options: Options, newline: str | None = None) -> Any:
    """Open a text file; invalid bytes do not raise, they are left for ``flaw`` to find."""
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    return open(path, encoding=encoding, errors=WRONG_BYTES, newline=newline)


def _numbered(path: str, options: Options) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number of each line, the line and what is wrong with its characters."""
    with open_text(path, options) as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\n"), flaw(line, options.encoding)


def _text(path: str, options: Options) -> RawRows:
    if options.chunks:
        yield from _chunks(path, options)
        return
    for number, line, wrong in _numbered(path, options):
        if wrong:
            yield Bad(wrong, path, number)
        elif line.strip() or options.blank:
            yield Row({"text": line}, path, number)


def _chunks(path: str, options: Options) -> RawRows:
    """Yield the text in large pieces without its bad lines, which are yielded on their own."""
    with open_text(path, options) as file:
        number, first = 1, True
        # Cut at the end of a line, unless that line is very long.
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


def _lines(path: str, options: Options) -> RawRows:
    pattern = re.compile(options.pattern or "")
    for number, line, wrong in _numbered(path, options):
        if line.strip():
            match = pattern.fullmatch(line)
            if wrong or match is None:
                yield Bad(wrong or f"does not match data.pattern: {line.strip()[:60]!r}", path, number)
            else:
                yield Row(match.groupdict(), path, number)


def _conll(path: str, options: Options) -> RawRows:
    """Yield sentences: blocks of lines separated by empty ones, each line a word with its columns."""
    match = re.compile(options.pattern).fullmatch if options.pattern else _word_and_tag
    widths: set[int] = set()  # the numbers of fields of lines that are certainly words
    for empty, block in groupby(_numbered(path, options), lambda numbered: not numbered[1].strip()):
        if empty:
            continue
        lines = [numbered for numbered in block if not numbered[1].startswith("-DOCSTART-")]
        widths.update(_num_fields(line) for _, line, _ in lines if not line.startswith("#"))
        words: list[tuple[int, dict[str, str | None]]] = []
        bad = None
        for number, line, wrong in lines:
            found = match(line)
            # '#' can be a word too: the line is a comment only if it does not look like the other lines.
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
    """Return the first and the last field, separated by tabs if the line has any, else by blanks."""
    return _BY_TABS.fullmatch(line) or _BY_BLANKS.fullmatch(line)


_BY_TABS = re.compile(r"(?P<tokens>[^\t]+)\t(?:.*\t)? *(?P<tags>\S+)\s*")
_BY_BLANKS = re.compile(r"(?P<tokens>\S+)(?:\s(?:.*\s)?(?P<tags>\S+))?\s*")


def _num_fields(line: str) -> int:
    return len(line.split("\t") if "\t" in line else line.split())


def _sentence(path: str, words: list[tuple[int, dict[str, str | None]]]) -> Row | Bad:
    """Return the columns of a sentence; one that no line has (tags of a file of bare words) is left out."""
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


def _table(path: str, options: Options, dialect: Mapping[str, Any]) -> RawRows:
    """Yield the rows of a table, whose first record is the header unless column names are given."""
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
                yield Bad(wrong or f"has {len(cells)} cells, expected {len(header)}: {shortened(header)}", path, number)
            else:
                yield Row(dict(zip(header, cells, strict=True)), path, number)


def _records(lines: Iterable[str], dialect: Mapping[str, Any]) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield, for each record that is not empty, the number of its first line, its cells, and what is wrong with it.

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
            if cells:
                yield number, cells, None


def _json(path: str, options: Options) -> RawRows:
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
    """Return the content of a whole JSON file. Raises UserError, with the line, for invalid JSON."""
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


def _squad(path: str, options: Options) -> RawRows:
    """Yield the questions of a SQuAD file (v1.1, or v2.0 with unanswerable ones); each paragraph is a document."""
    content = _document(path, options)
    if lack := _lack(content, data=list):
        raise UserError(f"{path}: expected SQuAD's format, but the file {lack}")
    numbers = count(1)
    for a, article in enumerate(content["data"]):
        place = f"data[{a}]"
        if lack := _lack(article, paragraphs=list):
            yield Bad(f"({place}) {lack}", path, next(numbers))
            continue
        title = article.get("title")
        for p, paragraph in enumerate(article["paragraphs"]):
            place = f"data[{a}].paragraphs[{p}]"
            if lack := _lack(paragraph, context=str, qas=list):
                yield Bad(f"({place}) {lack}", path, next(numbers))
                continue
            first = True
            for q, question in enumerate(paragraph["qas"]):
                number = next(numbers)
                if lack := _question_lack(question):
                    yield Bad(f"({place}.qas[{q}]) {lack}", path, number)
                    continue
                name = question.get("id")
                row = {
                    "id": str(name if isinstance(name, str | int) else number),
                    "title": title if isinstance(title, str) else "",
                    "context": paragraph["context"],
                    "question": question["question"],
                }
                if "answers" in question:
                    row["answers"] = {key: [answer[key] for answer in question["answers"]] for key in _ANSWER}
                yield Row(row, path, number, first)
                first = False


_ANSWER = {"text": str, "answer_start": int}


def _question_lack(question: Any) -> str | None:
    lack = _lack(question, question=str)
    if lack is None and "answers" in question:  # they are left out where they are to be predicted
        lack = _lack(question, answers=list)
        lack = lack or next(filter(None, (_lack(answer, **_ANSWER) for answer in question["answers"])), None)
    return lack


def _lack(part: Any, **expected: type) -> str | None:
    """Return which of the expected keys a part of a SQuAD file lacks, or holds with another type; None: all right."""
    for key, kind in expected.items():
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"has no {kind.__name__} '{key}'"
    return None


def _parquet(path: str, options: Options) -> RawRows:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for item in _batch_rows(batch):
                    number += 1
                    yield Bad(item, path, number) if isinstance(item, str) else Row(item, path, number)
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


def shortened(names: Iterable[str]) -> str:
    """Return a list of names, cut to a length that fits into a message."""
    text = ", ".join(names)
    return text if len(text) <= 200 else f"{text[:200]}..."


READERS: dict[str, Callable[[str, Options], RawRows]] = {
    "text": _text, "lines": _lines, "json": _json, "parquet": _parquet, "conll": _conll, "squad": _squad,
    "csv": partial(_table, dialect={}),
    "tsv": partial(_table, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE}),  # a quotation mark is text
}  # fmt: skip
