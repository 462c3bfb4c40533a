"""Opening files: how they are read, their encoding, what they are compressed with, and their lines."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit.data.rows import flaw
from llmkit.errors import Problem, UserError

Format = Literal["auto", "text", "csv", "tsv", "json", "parquet", "lines", "conll", "squad"]

WRONG_BYTES = "llmkit.wrong_bytes"

# Bytes that are invalid in the encoding become a lone surrogate, which valid text never holds: `flaw` finds it.
codecs.register_error(WRONG_BYTES, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)
"""What reading a file raises when it is damaged."""


@dataclass(frozen=True)
class Options:
    """How files are read; see the arguments of the same names of ``DataModule``."""

    format: Format = "auto"
    pattern: str | None = None
    column_names: list[str] | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    chunks: bool = False  # a text file is one document, read in chunks; otherwise each non-empty line is a row
    blanks: bool = False  # a blank line is a row without text, in formats where a row is a line

    def __post_init__(self) -> None:
        """Raise UserError for an invalid pattern, delimiter, encoding, or column name that comes twice."""
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise UserError(Problem("data.pattern", f"is not a regular expression: {error}")) from error
            if not groups:
                raise UserError(Problem("data.pattern", "has no named group; a column is written (?P<name>...)"))
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            text = f"must be one character, got {self.delimiter!r}; files with tabs are data.format: tsv"
            raise UserError(Problem("data.delimiter", text))
        names = self.column_names or []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(Problem("data.column_names", f"names '{twice}' twice"))
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise UserError(Problem("data.encoding", f"{error}")) from error


def _zstandard(path: str) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd")


def _zipped(path: str) -> Any:
    archive = zipfile.ZipFile(path)
    return archive.open(_member(path, archive))


def _member(path: str, archive: zipfile.ZipFile) -> str:
    """Return the name of the only file in an archive. Raises UserError when there are more, or none."""
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        some = f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
        raise UserError(f"{path} is a zip archive of {len(names)} files{some}. Unpack it and name those to read")
    return names[0]


_OPEN: list[tuple[re.Pattern[bytes], Callable[[str], Any]]] = [
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstandard),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), _zipped),
]
"""How compressed files begin, and what opens them."""

_ARCHIVES = [(re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive"), (re.compile(rb"Rar!\x1a\x07"), "a RAR archive")]


def _opener(path: str) -> Callable[[str], Any] | None:
    """Return what opens a compressed file, by how it begins; None: it is not compressed."""
    with open(path, "rb") as file:
        begin = file.read(10)
    for pattern, kind in _ARCHIVES:
        if pattern.match(begin):
            raise UserError(f"{path} is {kind}. Unpack it and name the files to read")
    return next((opener for pattern, opener in _OPEN if pattern.match(begin)), None)


def inner_name(path: str) -> str:
    """Return the name of a file without the suffix of its compression: ``a.csv`` for ``a.csv.gz``.

    Raises UserError for an archive of several files.
    """
    name = Path(path).name
    opener = _opener(path)
    if opener is _zipped:
        with zipfile.ZipFile(path) as archive:
            return _member(path, archive)
    if re.search(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$", name, re.IGNORECASE):
        raise UserError(f"{path} is a tar archive. Unpack it and name the files to read")
    return name if opener is None else re.sub(r"\.(gz|bz2|xz|zst)$", "", name, flags=re.IGNORECASE)


def open_text(path: str, options: Options, newline: str | None = None) -> Any:
    """Open a text file, compressed or not; invalid bytes do not raise, they are left for ``flaw`` to find."""
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    opener = _opener(path)
    if opener is None:
        return open(path, encoding=encoding, errors=WRONG_BYTES, newline=newline)
    return io.TextIOWrapper(io.BufferedReader(opener(path)), encoding, WRONG_BYTES, newline)


def lines(path: str, options: Options) -> Iterator[str]:
    """Yield the lines of a text file, without their ends.

    A line ends with a line feed, or a carriage return and a line feed. A carriage return alone is text (a line of a
    parallel file would otherwise become two), unless the file has no line feed at all.
    """
    with open_text(path, options, newline="\n") as file:
        for number, line in enumerate(file):
            if line.endswith("\n"):
                yield line[:-2] if line.endswith("\r\n") else line[:-1]
            elif number:
                yield line
            else:
                yield from line.removesuffix("\r").split("\r")


def numbered(path: str, options: Options) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number of each line, the line and what is wrong with its characters."""
    for number, line in enumerate(lines(path, options), 1):
        yield number, line, flaw(line, options.encoding)


def shortened(names: Iterable[str]) -> str:
    """Return a list of names, cut to a length that fits into a message."""
    text = ", ".join(names)
    return text if len(text) <= 200 else f"{text[:200]}..."
