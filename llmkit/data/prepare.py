"""From rows to features: columns become the head's fields, a part is chosen, the head encodes it in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmkit.contracts import Head, Tokenizer
from llmkit.data.opening import shortened
from llmkit.data.rows import BLANK, REPEATED, Bad, RawRows, Row, Skipped, Source, flaw
from llmkit.data.tokens import Ending, Piece
from llmkit.errors import Problem, UserError, nearest, place, returned
from llmkit.ops.writing import special_ids

GROUP, CHARACTERS = 1000, 2_000_000  # the most rows and characters that are encoded at once
MISSING = object()  # the value of a column that a row does not have


class Item(NamedTuple):
    """The head's fields of one row, the number of its document (most rows are one of their own), and its place.

    Of a row to predict that has no text, there are no fields.
    """

    fields: dict[str, Any]
    document: int
    file: str = ""
    number: int = 0


ReadItems = Callable[[], Iterator[Item]]
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Fields:
    """The head's fields that are read, and the column of each."""

    columns: Mapping[str, str | list[str]]
    texts: frozenset[str]
    words: frozenset[str]
    predict: bool
    advice: str = ""

    @classmethod
    def of(cls, head: Head, columns: Mapping[str, str | list[str]], predict: bool, source: Source) -> Fields:
        """Return the fields of a head, without targets when predicting. Raises UserError for unknown ``columns``.

        If the rows of ``source`` are plain text, their column serves as the only field that a head asks for.
        """
        known = tuple(dict.fromkeys((*head.inputs, *head.targets)))
        for name in columns:
            if name not in known:
                hint = f"{nearest(name, known)} Fields: {', '.join(known)}."
                raise UserError(Problem("data.columns", f"the head has no field '{name}'.{hint}"))
            if not isinstance(columns[name], str) and name not in head.texts:
                raise UserError(Problem(f"data.columns.{name}", "is not a text: it is read from one column"))
        needed = head.inputs if predict else known
        plain_text = source.single and len(needed) == 1
        found = {name: "text" if plain_text else columns.get(name, name) for name in needed}
        return cls(found, frozenset(head.texts), frozenset(head.words), predict, source.advice)

    def items(self, rows: RawRows, skipped: Skipped) -> Iterator[Item]:
        """Yield rows with the head's fields; those that are bad or lack a field are added to ``skipped``."""
        document, begins = -1, False
        skipped.begin()
        for row in rows:
            if isinstance(row, Row):
                if row.data is BLANK and not self.predict:
                    continue
                begins = begins or row.first  # the first rows of a document may be bad
                found = {} if row.data is BLANK else self._fields(row)
                if not isinstance(found, Bad):
                    if self.predict and not any(str(value).strip() for value in found.values()):
                        found = {}
                    document, begins = document + begins, False
                    skipped.seen += row.lines
                    yield Item(found, document, row.file, row.number)
                    continue
                row = found
            skipped.add(row)
            skipped.seen += 1

    def _fields(self, row: Row) -> dict[str, Any] | Bad:
        fields: dict[str, Any] = {}
        pairs = ((name, column) for name, given in self.columns.items() for column in _listed(given))
        for name, column in pairs:
            value = _value(row.data, column)
            if value is MISSING:
                known = _columns(row.data)
                meant = nearest(column, known)
                hint = f"Columns: {shortened(known) or '(none)'}. data.columns names those to read."
                missing = f"has no column '{column}' for the head's field '{name}'.{meant} {hint}"
                return Bad(missing if meant else missing + self.advice, row.file, row.number)
            problem = flaw(value) if isinstance(value, str) else self._problem(name, value)
            if problem:
                return Bad(f"{problem} in column '{column}'", row.file, row.number)
            # A text may be a list of paragraphs, and come from several columns.
            value = "\n".join(value) if name in self.texts and isinstance(value, list) else value
            fields[name] = f"{fields[name]}\n{value}" if name in fields else value
        return fields

    def _problem(self, name: str, value: Any) -> str | None:
        """Return what is wrong with the value of a field that is not a string."""
        if value is REPEATED:
            return "has more than one value"
        if value is None or value != value:  # NaN
            return f"has an empty cell ({'null' if value is None else 'NaN'})"
        parts = value if isinstance(value, list) else [value]
        strings = [part for part in parts if isinstance(part, str)]
        is_text = name in self.texts or name in self.words
        if (is_text and len(strings) < len(parts)) or isinstance(value, bytes):
            return f"has {type(value).__name__}, expected text or a list of texts,"
        return flaw("".join(strings))


def _listed(columns: str | list[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else columns


def _value(data: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; ``translation.en`` is also the value ``en`` of the mapping ``translation``."""
    if column in data:
        return data[column]
    outer, dot, inner = column.partition(".")
    nested = data.get(outer)
    return _value(nested, inner) if dot and isinstance(nested, Mapping) else MISSING


def _columns(data: Mapping[str, Any]) -> list[str]:
    """Return the names of a row's columns, those of nested mappings dotted."""
    names = []
    for name, value in data.items():
        names += [f"{name}.{inner}" for inner in _columns(value)] if isinstance(value, Mapping) else [name]
    return names


def num_characters(item: Item) -> int:
    """Return the number of characters in the texts of an item."""
    return sum(len(value) for value in item.fields.values() if isinstance(value, str))


@dataclass(frozen=True)
class Column:
    """A column of a split, read again by every iteration, so that it need not fit into memory.

    ``place`` is shared by the columns of a split. It holds ``file:number`` of the row that was read last in any of
    them, and is empty before the first row and after the last one.
    """

    read: ReadItems
    name: str
    place: list[str]

    def __iter__(self) -> Iterator[Any]:
        for item in self.read():
            self.place[:] = [f"{item.file}:{item.number}"]
            yield item.fields[self.name]
        self.place.clear()


def texts(read: ReadItems, head: Head) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on: every text of a split, whole or cut into words by the head."""
    for item in read():
        for name, value in item.fields.items():
            if name in head.words:
                yield from head.words[name](value)
            elif name in head.texts:
                yield value


def grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items in the groups that are encoded at once."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += num_characters(item)
        if len(group) >= GROUP or size >= CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def with_text(items: Iterable[Item], blank: list[int]) -> Iterator[Item]:
    """Yield the items that have fields; the numbers of the others are added to ``blank``."""
    for number, item in enumerate(items):
        if item.fields:
            yield item
        else:
            blank.append(number)


@dataclass(frozen=True)
class Encoder:
    """Encodes items: to features or, for a head that joins its rows, to pieces of the stream of tokens."""

    head: Head
    tokenizer: Tokenizer
    context: int
    joins: Ending | None

    def groups(self, items: Iterable[Item], skipped: Skipped, progress: Progress | None = None) -> Iterator[Any]:
        """Yield the features, or the list of pieces, of each group of items.

        A group that the head refuses is halved until the rows at fault are found, and added to ``skipped``. Sizes of
        groups are reported to ``progress`` when they are done.
        """
        for group in grouped(items):
            yield from self._group(group, skipped)
            if progress:
                progress(len(group))

    def _group(self, group: list[Item], skipped: Skipped) -> Iterator[Any]:
        columns = {name: [item.fields[name] for item in group] for name in group[0].fields}
        try:
            found = self.head.encode(columns, self.tokenizer, self.context)
        except UserError as error:
            if len(group) == 1:
                skipped.add(Bad(f"is refused by the head: {error}", group[0].file, group[0].number))
                return
            half = len(group) // 2
            yield from self._group(group[:half], skipped)
            yield from self._group(group[half:], skipped)
        else:
            self._check(found, len(group))
            yield self._pieces(group, found["ids"]) if self.joins else found

    def _check(self, found: Any, rows: int) -> None:
        """Raise UserError unless the head returned columns of features, a value for each row."""
        if not isinstance(found, dict):
            raise returned(self.head, "encode", found, "a dict of columns")
        for name, column in found.items():
            if not isinstance(column, list) or len(column) != rows:
                held = f"{len(column)} values" if isinstance(column, list) else f"a {type(column).__name__}"
                got = f"{held} as the feature '{name}' of {rows} rows; the contract wants a list with one for each row"
                raise UserError(f"{place(type(self.head).encode)} returned {got}")
            first = column[0][:1] if isinstance(column[0], list) else column[:1]
            if not all(isinstance(value, int | str | np.integer) for value in first):
                inner = "" if first[0] is column[0] else f" of {type(first[0]).__name__}"
                kind = f"{type(column[0]).__name__}{inner}"
                got = f"{kind} as a value of the feature '{name}'; the contract wants ints, lists of ints, or strings"
                raise UserError(f"{place(type(self.head).encode)} returned {got}")

    def _pieces(self, group: list[Item], ids: list[list[int]]) -> list[Piece]:
        """Return the tokens of each item, with the bytes of its texts."""
        names = [name for name in self.head.texts if name in group[0].fields]
        texts = ["".join(item.fields[name] for name in names) for item in group]
        hidden = hidden_bytes(texts, ids, self.tokenizer)
        return [
            Piece(tokens, len(text.encode()), item.document, count)
            for item, text, tokens, count in zip(group, texts, ids, hidden, strict=True)
        ]


def hidden_bytes(texts: list[str], ids: list[list[int]], tokenizer: Tokenizer) -> list[int]:
    """Return how many bytes of each text its unknown tokens stand for.

    The ids are decoded with a known token in place of each unknown one, and what is then missing is counted:
    ``the zzz sat`` becomes ``the the sat``, 8 bytes without the ``the`` put in, so 3 of 11 are missing. White space
    does not count where the tokenizer does not keep it.
    """

    def size(text: str) -> int:
        return len(text.encode()) if tokenizer.lossless else len(" ".join(text.split()).encode())

    found = [0] * len(texts)
    rows = [number for number, row in enumerate(ids) if tokenizer.unk_id in row]
    special = special_ids(tokenizer)
    known = next((token for token in range(tokenizer.vocab_size) if token not in special), None)
    if not rows or known is None:
        return found
    instead = [[known if token == tokenizer.unk_id else token for token in ids[number]] for number in rows]
    length = size(tokenizer.decode([known]))
    for number, text in zip(rows, tokenizer.decode_batch(instead), strict=True):
        count = ids[number].count(tokenizer.unk_id)
        found[number] = max(count, size(texts[number]) - size(text) + count * length)  # at least a byte for each
    return found
