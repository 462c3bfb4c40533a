"""Rows from local files (text, lines, CSV, TSV, JSON, Parquet, CoNLL, SQuAD, parallel files) and from ``datasets``."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmkit.errors import UserError

Files = str | list[str] | dict[str, str] | None
Format = Literal["auto", "text", "csv", "tsv", "json", "parquet", "lines", "conll", "squad"]

CHUNK = 256 * 1024  # characters of a large text that are read as one row
SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
}  # fmt: skip


class Row(NamedTuple):
    """One row as it was read, and where it stands."""

    data: Mapping[str, Any]
    file: str
    number: int
    """Line of a text file, or row of a table, from 1; a CoNLL sentence has that of its first line."""
    first: bool = True
    """Whether a document begins here; False for later chunks of a large text, and further questions of a paragraph."""

    @property
    def place(self) -> str:
        """``file:number``, for messages."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Options:
    """How files are read; see the arguments of the same names of ``DataModule``."""

    format: Format = "auto"
    pattern: str | None = None
    column_names: list[str] | None = None
    encoding: str = "utf-8"
    chunks: bool = False  # a text file is one document, in chunks; otherwise each non-empty line is a row


@dataclass(frozen=True)
class Rows:
    """A split: rows that can be read again and again."""

    key: str  # the config key it came from, for messages
    names: list[str]  # files, or the split of a data set
    read: Callable[[], Iterator[Row]]
    single: bool = False  # plain text: one column, which serves whatever single field the head asks for
    files: list[str] = field(default_factory=list)  # their contents say whether a cached result is still right
    identity: Any = None  # what else does
    sharded: Callable[[int, int], Iterator[Row]] | None = None  # (rank, world): the reader splits itself


def files_of(key: str, value: str | list[str]) -> list[str]:
    """Return the sorted files of paths and glob patterns. Raises UserError when one matches nothing."""
    found: set[str] = set()
    for path in [value] if isinstance(value, str) else value:
        path = os.path.expanduser(path)
        matches = [path] if os.path.isfile(path) else [m for m in glob.glob(path, recursive=True) if os.path.isfile(m)]
        if not matches:
            raise UserError(f"{key}: no file '{path}'{_data_hint(path)}")
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
    """Return the rows of local files. Raises UserError for missing files; reading raises it for malformed ones."""
    if isinstance(value, dict):
        paths = {name: files_of(key, path) for name, path in value.items()}
        for name, files in paths.items():
            if len(files) != 1:
                raise UserError(f"{key}.{name}: parallel files come one by field, '{value[name]}' gives {len(files)}")
        columns = {name: files[0] for name, files in paths.items()}
        names = [Path(path).name for path in columns.values()]
        files = list(columns.values())
        parallel = partial(_parallel, key, columns, options)
        return Rows(key, names, parallel, files=files, identity=[list(columns), options.encoding])
    files = files_of(key, value)
    formats = [_format_of(path, options) for path in files]
    if "lines" in formats and options.pattern is None:
        raise UserError("data.format: 'lines' needs data.pattern, a regular expression with named groups")

    single = all(format == "text" for format in formats)
    names = [Path(path).name for path in files]
    identity: list[Any] = [names, formats, options.pattern, options.column_names, options.encoding, options.chunks]
    return Rows(key, names, partial(_read, key, files, formats, options), single, files, identity)


def _read(key: str, files: list[str], formats: list[Format], options: Options) -> Iterator[Row]:
    for path, format in zip(files, formats, strict=True):
        try:
            yield from _READERS[format](path, options)
        except UnicodeDecodeError as error:
            raise UserError(_bad_encoding(key, path, options.encoding, error)) from error
        except (OSError, ValueError, csv.Error, LookupError) as error:
            text = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
            raise UserError(f"{key}: " + " ".join(text.split())) from error


def _format_of(path: str, options: Options) -> Format:
    if options.format != "auto":
        return options.format
    if options.pattern is not None:
        return "lines"
    return SUFFIXES.get(Path(path).suffix.lower(), "text")


def _open(path: str, options: Options, newline: str | None = None) -> Any:
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    return open(path, encoding=encoding, newline=newline)


def _bad_encoding(key: str, path: str, encoding: str, error: UnicodeDecodeError) -> str:
    """Return a message with the line of the first bytes that cannot be decoded, where lines can be told apart."""
    place = path
    with open(path, "rb") as file:
        for number, content in enumerate(file, 1):
            try:
                content.decode(encoding)
            except UnicodeDecodeError:
                place = f"{path}:{number}"
                break
    return f"{key}: {place} is not {encoding} ({error.reason}). Set data.encoding to the encoding of the file."


def _text(path: str, options: Options) -> Iterator[Row]:
    with _open(path, options) as file:
        if options.chunks:
            # Cut at a line's end, but do not look for it forever.
            number = 1
            while chunk := file.read(CHUNK) + file.readline(CHUNK):
                yield Row({"text": chunk}, path, number, first=number == 1)
                number += chunk.count("\n") or 1
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\n")}, path, number)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.pattern is not a regular expression: {error}") from error
    if not compiled.groupindex:
        raise UserError("data.pattern has no named group; a column is written (?P<name>...)")
    return compiled


def _lines(path: str, options: Options) -> Iterator[Row]:
    pattern = _compiled(options.pattern or "")
    with _open(path, options) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                match = pattern.fullmatch(line.rstrip("\n"))
                if match is None:
                    raise UserError(f"{path}:{number} does not match data.pattern: {line.strip()[:60]!r}")
                yield Row(match.groupdict(), path, number)


def _conll(path: str, options: Options) -> Iterator[Row]:
    """Yield sentences: blocks of lines, a word with its columns on each, that empty lines divide."""
    match = _compiled(options.pattern).fullmatch if options.pattern else _word_and_tag
    widths: set[int] = set()  # numbers of fields that lines of words have
    with _open(path, options) as file:
        for empty, block in groupby(enumerate(file, 1), lambda numbered: not numbered[1].strip()):
            if empty:
                continue
            lines = [(number, line.rstrip("\n")) for number, line in block if not line.startswith("-DOCSTART-")]
            widths.update(_num_fields(line) for _, line in lines if not line.startswith("#"))
            words: list[tuple[int, dict[str, str | None]]] = []
            for number, line in lines:
                found = match(line)
                # A word may be '#': such a line is a comment only where it does not look like the others.
                if line.startswith("#") and (found is None or not (options.pattern or _num_fields(line) in widths)):
                    continue
                if found is None:
                    wrong = "does not match data.pattern" if options.pattern else "does not begin with a word"
                    raise UserError(f"{path}:{number} {wrong}: {line[:60]!r}")
                words.append((number, found.groupdict()))
            if words:
                yield _sentence(path, words)


def _word_and_tag(line: str) -> re.Match[str] | None:
    """Return the first and the last field, which are divided by tabs where there is one, else by blanks."""
    return _BY_TABS.fullmatch(line) or _BY_BLANKS.fullmatch(line)


_BY_TABS = re.compile(r"(?P<tokens>[^\t]+)\t(?:.*\t)? *(?P<tags>\S+)\s*")
_BY_BLANKS = re.compile(r"(?P<tokens>\S+)(?:\s(?:.*\s)?(?P<tags>\S+))?\s*")


def _num_fields(line: str) -> int:
    return len(line.split("\t") if "\t" in line else line.split())


def _sentence(path: str, words: list[tuple[int, dict[str, str | None]]]) -> Row:
    """Return the columns of a sentence; one that no line has (words without tags, say) is left out."""
    data: dict[str, list[str]] = {}
    for name in words[0][1]:
        if all(columns[name] is None for _, columns in words):
            continue
        data[name] = []
        for number, columns in words:
            value = columns[name]
            if value is None:
                raise UserError(f"{path}:{number} has no '{name}', other lines of the sentence have")
            data[name].append(value)
    return Row(data, path, words[0][0])


def _table(path: str, options: Options, dialect: Mapping[str, Any]) -> Iterator[Row]:
    """Yield rows of a table with a header, or without one where the column names are given; cells stay strings."""
    csv.field_size_limit(2**31 - 1)
    with _open(path, options, newline="") as file:
        reader = csv.reader(file, strict=True, **dialect)
        header = options.column_names or next(reader, [])
        for cells in reader:
            if len(cells) == len(header):
                yield Row(dict(zip(header, cells, strict=True)), path, reader.line_num)
            elif cells:
                raise UserError(f"{path}:{reader.line_num} has {len(cells)} cells, expected {len(header)}: {header}")


def _csv(path: str, options: Options) -> Iterator[Row]:
    return _table(path, options, {})


def _tsv(path: str, options: Options) -> Iterator[Row]:
    # In tab-separated files a quotation mark is text.
    return _table(path, options, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _json(path: str, options: Options) -> Iterator[Row]:
    """Yield objects, one a line or from one list."""
    with _open(path, options) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        items: Iterable[tuple[int, Any]]
        if start == "[":
            try:
                items = enumerate(json.load(file), 1)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
        else:
            items = ((number, _json_line(path, number, line)) for number, line in enumerate(file, 1) if line.strip())
        for number, item in items:
            if not isinstance(item, dict):
                raise UserError(f"{path}:{number} holds {type(item).__name__}, expected an object")
            yield Row(item, path, number)


def _json_line(path: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        expected = ". Expected one object a line, or one list of objects; for SQuAD's files set data.format: squad"
        hint = expected if number == 1 else ""
        raise UserError(f"{path}:{number} is not JSON: {error.msg}{hint}") from error


def _squad(path: str, options: Options) -> Iterator[Row]:
    """Yield the questions of a SQuAD file (v1.1, or v2.0 with unanswerable ones); each paragraph is a document."""
    with _open(path, options) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
    place = ""

    def get(parent: Any, key: str, kind: type) -> Any:
        value = parent.get(key) if isinstance(parent, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{path}: expected SQuAD's format, but {place or 'the file'} has no {kind.__name__} '{key}'"
            )
        return value

    number = 0
    for a, article in enumerate(get(content, "data", list)):
        place = f"data[{a}]"
        for p, paragraph in enumerate(get(article, "paragraphs", list)):
            place = f"data[{a}].paragraphs[{p}]"
            context = get(paragraph, "context", str)
            for q, entry in enumerate(get(paragraph, "qas", list)):
                number += 1
                place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                question = get(entry, "question", str)
                row: dict[str, Any] = {"id": str(entry.get("id", number)), "title": str(article.get("title", ""))}
                row |= {"context": context, "question": question}
                if "answers" in entry:  # there are none where they are to be predicted
                    answers = get(entry, "answers", list)
                    row["answers"] = {
                        "text": [get(answer, "text", str) for answer in answers],
                        "answer_start": [get(answer, "answer_start", int) for answer in answers],
                    }
                yield Row(row, path, number, first=q == 0)


def _parquet(path: str, options: Options) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for item in batch.to_pylist():
            number += 1
            yield Row(item, path, number)


_READERS: dict[str, Callable[[str, Options], Iterator[Row]]] = {
    "text": _text, "lines": _lines, "csv": _csv, "tsv": _tsv, "json": _json, "parquet": _parquet,
    "conll": _conll, "squad": _squad,
}  # fmt: skip


def _parallel(key: str, columns: dict[str, str], options: Options) -> Iterator[Row]:
    """Yield one row a line from files whose lines belong together."""
    file = ""
    try:
        files = {name: _open(path, options) for name, path in columns.items()}
        try:
            for number, lines in enumerate(zip_longest(*files.values()), 1):
                if None in lines:
                    counts = [sum(1 for _ in _open(path, options)) for path in columns.values()]
                    told = ", ".join(f"{path}: {count}" for path, count in zip(columns.values(), counts, strict=True))
                    raise UserError(f"{key}: parallel files have unequal numbers of lines ({told})")
                yield Row({name: line.rstrip("\n") for name, line in zip(files, lines, strict=True)}, file, number)
        finally:
            for opened in files.values():
                opened.close()
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {list(columns.values())} are not all {options.encoding}: {error.reason}") from error
