"""From rows to features: columns become the head's fields, a part is chosen, the head encodes it in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llmkit.contracts import Head, Stage, Tokenizer
from llmkit.data.formats import shortened
from llmkit.data.rows import Bad, Row, Rows, Skipped, flaw
from llmkit.data.tokens import Piece
from llmkit.errors import Problem, UserError, nearest

T = TypeVar("T")

ROWS, CHARACTERS = 1000, 2_000_000  # most that is encoded at once


class Item(NamedTuple):
    """The head's fields of one row, the document it is part of (of its own for most rows), and where it stands."""

    fields: dict[str, Any]
    document: int
    file: str = ""
    number: int = 0


Read = Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Fields:
    """Which fields are read, from which columns."""

    needed: tuple[str, ...]
    texts: frozenset[str]
    words: frozenset[str]
    columns: Mapping[str, str]

    @classmethod
    def of(cls, head: Head, columns: Mapping[str, str] | None, predict: bool) -> Fields:
        """Return the fields of a head; targets are not read when predicting. Raises UserError for unknown ones."""
        known = tuple(dict.fromkeys((*head.inputs, *head.targets)))
        for name in columns or {}:
            if name not in known:
                hint = f"{nearest(name, known)} Fields: {', '.join(known)}."
                raise UserError(Problem("data.columns", f"the head has no field '{name}'.{hint}"))
        texts = frozenset(head.texts)
        return cls(head.inputs if predict else known, texts, frozenset(head.words) - texts, dict(columns or {}))

    def column(self, name: str, rows: Rows) -> str:
        """Return the column of a field; plain text serves the only field that is asked for."""
        return "text" if rows.single and len(self.needed) == 1 else self.columns.get(name, name)

    def items(self, rows: Rows, read: Iterator[Row | Bad], skipped: Skipped) -> Iterator[Item]:
        """Yield rows with the head's fields; ``skipped`` gets those that are bad or lack a field."""
        columns = [(name, self.column(name, rows)) for name in self.needed]
        document, begins = -1, False
        skipped.begin()
        for row in read:
            if isinstance(row, Row):
                begins = begins or row.first  # the first rows of a document may be bad
                found = self._fields(row, columns)
                if not isinstance(found, Bad):
                    document, begins = document + begins, False
                    skipped.seen += row.lines
                    yield Item(found, document, row.file, row.number)
                    continue
                row = found
            skipped.add(row)
            skipped.seen += 1

    def _fields(self, row: Row, columns: list[tuple[str, str]]) -> dict[str, Any] | Bad:
        fields = {}
        for name, column in columns:
            if column not in row.data:
                found = f"Columns: {shortened(row.data) or '(none)'}. data.columns names those to read."
                missing = f"has no column '{column}' for the head's field '{name}'.{nearest(column, row.data)} {found}"
                return Bad(missing, row.file, row.number)
            value = row.data[column]
            problem = flaw(value) if isinstance(value, str) else self._problem(name, value)
            if problem:
                return Bad(f"{problem} in column '{column}'", row.file, row.number)
            # A text may come in paragraphs.
            fields[name] = "\n".join(value) if name in self.texts and isinstance(value, list) else value
        return fields

    def _problem(self, name: str, value: Any) -> str | None:
        """Return what is wrong with the value of a field that is not a string."""
        if value is None:
            return "has an empty cell (null)"
        parts = value if isinstance(value, list) else [value]
        strings = [part for part in parts if isinstance(part, str)]
        text = name in self.texts or name in self.words
        if (text and len(strings) < len(parts)) or isinstance(value, bytes):
            return f"has {type(value).__name__}, expected text or a list of texts,"
        return flaw("".join(strings))


def measure(read: Read, text: str | None) -> tuple[int, int]:
    """Return the number of documents of a split, and of the characters in field ``text``."""
    count = characters = 0
    for item in read():
        count = item.document + 1
        characters += len(item.fields[text]) if text else 0
    return count, characters


def cut(read: Read, size: tuple[int, int], key: str, share: float, part: Stage, text: str | None) -> Iterator[Item]:
    """Yield the training or the validation part of a split that serves as both.

    Of several documents (or rows) a random share is validation, at least one and the same for every ``data.seed``.
    Of a single text the last share of the characters is (``text``: the field it is in; None: rows cannot be cut).
    ``size`` is what ``measure`` gave.
    """
    count, characters = size
    if count == 1 and text:
        left = int(characters * (1 - share))
        if part == "validation":
            left = characters - left
        skip = 0 if part == "train" else characters - left
        for item in read():
            piece = item.fields[text][skip:]
            skip = max(0, skip - len(item.fields[text]))
            if piece[:left]:
                yield item._replace(fields={**item.fields, text: piece[:left]}, document=0)
            left = max(0, left - len(piece))
        return
    if count == 1:
        raise UserError(Problem(key, "has one row only, none is left for validation. Set data.validation."))
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[: max(0, min(max(1, round(count * share)), count - 1))]] = True
    for item in read():
        if chosen[item.document] == (part == "validation"):
            yield item


class Columns(Mapping[str, Iterable[Any]]):
    """Columns of a split, read again by every iteration, so that none has to fit into memory.

    Attributes:
        at: the place of the row that was given last; empty before the first and after the last one.
    """

    def __init__(self, read: Read, names: Iterable[str]) -> None:
        self._read, self._names, self.at = read, tuple(names), ""

    def __getitem__(self, name: str) -> Iterable[Any]:
        if name not in self._names:
            raise KeyError(name)
        return _Column(self, self._read, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class _Column:
    columns: Columns
    read: Read
    name: str

    def __iter__(self) -> Iterator[Any]:
        for item in self.read():
            self.columns.at = f"{item.file}:{item.number}"
            yield item.fields[self.name]
        self.columns.at = ""


def texts(read: Read, head: Head) -> Iterator[str]:
    """Yield every text of a split, whole or cut as the head has it encoded; a tokenizer is trained on them."""
    for item in read():
        for name, value in item.fields.items():
            if name in head.words:
                yield from head.words[name](value)
            elif name in head.texts:
                yield value


def grouped(items: Iterable[Item], rows: int = ROWS) -> Iterator[list[Item]]:
    """Yield items in groups that are encoded at once."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += sum(len(value) for value in item.fields.values() if isinstance(value, str))
        if len(group) >= rows or size >= CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def encoded(group: list[Item], encode: Callable[[list[Item]], T], skipped: Skipped) -> Iterator[T]:
    """Yield what ``encode`` makes of a group: in smaller groups when the head refuses it, to find the rows at fault."""
    try:
        found = encode(group)
    except UserError as error:
        if len(group) == 1:
            skipped.add(Bad(f"is refused by the head: {error}", group[0].file, group[0].number))
            return
        half = len(group) // 2
        yield from encoded(group[:half], encode, skipped)
        yield from encoded(group[half:], encode, skipped)
    else:
        yield found


def features(group: list[Item], head: Head, tokenizer: Tokenizer, context: int) -> dict[str, list[Any]]:
    """Return what the head makes of a group of items, column by column."""
    columns = {name: [item.fields[name] for item in group] for name in group[0].fields}
    return head.encode(columns, tokenizer, context)


def pieces(group: list[Item], head: Head, tokenizer: Tokenizer, context: int) -> list[Piece]:
    """Return the tokens of a group of items, for a head that joins its rows."""
    names = [name for name in head.texts if name in group[0].fields]
    ids = features(group, head, tokenizer, context)["ids"]
    return [
        Piece(found, sum(len(item.fields[name].encode()) for name in names), item.document)
        for item, found in zip(group, ids, strict=True)
    ]
