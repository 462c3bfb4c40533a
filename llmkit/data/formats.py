"""Readers of file formats: each yields the rows of a file, with a ``Bad`` in place of each row that cannot be used.

A file that cannot be read as a whole (JSON that ends in the middle, damaged Parquet) raises UserError.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import partial
from io import StringIO
from itertools import groupby

from llmkit.data.json_files import json_rows, squad_rows
from llmkit.data.opening import Options, numbered, open_text
from llmkit.data.rows import Bad, RawRows, Row, flaw
from llmkit.data.tables import parquet_rows, table_rows

CHUNK = 256 * 1024  # characters of a large text that are read as one row
NO_MATCH = "does not match data.pattern"


def _text(path: str, options: Options) -> RawRows:
    if options.chunks:
        yield from _chunks(path, options)
        return
    for number, line, wrong in numbered(path, options):
        if wrong:
            yield Bad(wrong, path, number)
        elif line.strip() or options.blanks:
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
    for number, line, wrong in numbered(path, options):
        if line.strip():
            match = pattern.fullmatch(line)
            if wrong or match is None:
                advice = ". For a file of another form set data.pattern: null" if number == 1 else ""
                yield Bad(wrong or f"{NO_MATCH}: {line.strip()[:60]!r}{advice}", path, number)
            else:
                yield Row(match.groupdict(), path, number)
        elif options.blanks:
            yield Row(dict.fromkeys(pattern.groupindex, ""), path, number)


def _conll(path: str, options: Options) -> RawRows:
    """Yield sentences: blocks of lines separated by empty ones, each line a word with its columns."""
    match = re.compile(options.pattern).fullmatch if options.pattern else _word_and_tag
    widths: set[int] = set()  # the numbers of fields of lines that are certainly words
    for empty, block in groupby(numbered(path, options), lambda line: not line[1].strip(_BLANKS)):
        if empty:
            continue
        lines = [line for line in block if not line[1].startswith("-DOCSTART-")]
        widths.update(_num_fields(line) for _, line, _ in lines if not line.startswith("#"))
        words: list[tuple[int, dict[str, str | None]]] = []
        bad = None
        for number, line, wrong in lines:
            found = match(line)
            # '#' can be a word too: the line is a comment only if it does not look like the other lines.
            if line.startswith("#") and (found is None or not (options.pattern or _num_fields(line) in widths)):
                continue
            if wrong or found is None:
                what = NO_MATCH if options.pattern else "does not begin with a word"
                bad = Bad(wrong or f"{what}: {line[:60]!r}", path, number)
                break
            words.append((number, found.groupdict()))
        if bad:
            yield bad
        elif words:
            yield _sentence(path, words)


def _word_and_tag(line: str) -> re.Match[str] | None:
    """Return the first and the last field, separated by tabs if the line has any, else by blanks.

    Other white space (a no-break or an ideographic space) is part of a word, or a word.
    """
    return _BY_TABS.fullmatch(line) or _BY_BLANKS.fullmatch(line)


_BLANKS = " \t"
_BY_TABS = re.compile(r"(?P<tokens>[^\t]+)\t(?:.*\t)? *(?P<tags>[^ \t]+)[ \t]*")
_BY_BLANKS = re.compile(r"(?P<tokens>[^ \t]+)(?:[ \t](?:.*[ \t])?(?P<tags>[^ \t]+))?[ \t]*")


def _num_fields(line: str) -> int:
    return len(line.split("\t") if "\t" in line else re.split(" +", line.strip(" ")))


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


READERS: dict[str, Callable[[str, Options], RawRows]] = {
    "text": _text, "lines": _lines, "conll": _conll, "json": json_rows, "squad": squad_rows, "parquet": parquet_rows,
    "csv": partial(table_rows, dialect={}),
    "tsv": partial(table_rows, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE}),  # a quotation mark is text
}  # fmt: skip
