"""From rows to features: columns become the head's fields, a part is chosen, the head encodes it in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit.contracts import Head, Stage, Tokenizer
from llmkit.data.sources import Row, Rows
from llmkit.data.tokens import Piece
from llmkit.errors import UserError, nearest

ROWS, CHARACTERS = 1000, 2_000_000  # most that is encoded at once


class Item(NamedTuple):
    """The head's fields of one row, and the document it is part of (a document of its own for most rows)."""

    fields: dict[str, Any]
    document: int


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
                raise UserError(f"data.columns: the head has no field '{name}'.{hint}")
        texts = frozenset(head.texts)
        return cls(head.inputs if predict else known, texts, frozenset(head.words) - texts, dict(columns or {}))

    def column(self, name: str, rows: Rows) -> str:
        """Return the column of a field; plain text serves the only field that is asked for."""
        return "text" if rows.single and len(self.needed) == 1 else self.columns.get(name, name)

    def items(self, rows: Rows, read: Iterator[Row]) -> Iterator[Item]:
        """Yield rows with the head's fields. Raises UserError, with the place, for a missing column or cell."""
        columns = [(name, self.column(name, rows), name in self.texts, name in self.words) for name in self.needed]
        document = -1
        for row in read:
            fields = {}
            for name, column, is_text, is_words in columns:
                value = row.data.get(column)
                if value is None:
                    raise _missing(rows, row, name, column)
                if (is_text or is_words) and not isinstance(value, str):
                    if not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
                        found = f"column '{column}' at {row.place} is {type(value).__name__}"
                        raise UserError(f"{rows.key}: {found}, expected text or a list of texts")
                    if is_text:
                        value = "\n".join(value)  # paragraphs
                fields[name] = value
            document += row.first
            yield Item(fields, document)


def _missing(rows: Rows, row: Row, name: str, column: str) -> UserError:
    if column in row.data:
        return UserError(f"{rows.key}: column '{column}' at {row.place} is empty (null)")
    found = ", ".join(row.data) or "(none)"
    return UserError(
        f"data.columns: column '{column}' for the head's field '{name}' is not in {Path(row.file).name} "
        f"(row {row.number}).{nearest(column, row.data)} Columns: {found}."
    )


def measure(read: Read, text: str | None) -> tuple[int, int]:
    """Return the number of documents of a split, and of the characters in field ``text``."""
    count = characters = 0
    for item in read():
        count = item.document + 1
        characters += len(item.fields[text]) if text else 0
    return count, characters


def cut(read: Read, size: tuple[int, int], key: str, share: float, part: Stage, text: str | None) -> Iterator[Item]:
    """Yield the training or the validation part of a split that has to serve for both.

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
                yield Item({**item.fields, text: piece[:left]}, 0)
            left = max(0, left - len(piece))
        return
    if count == 1:
        raise UserError(f"{key}: has one row only, none is left for validation. Set data.validation.")
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[: max(0, min(max(1, round(count * share)), count - 1))]] = True
    for item in read():
        if chosen[item.document] == (part == "validation"):
            yield item


class Columns(Mapping[str, Iterable[Any]]):
    """Columns of a split that are read again whenever they are iterated, so that none need fit into memory."""

    def __init__(self, read: Read, names: Iterable[str]) -> None:
        self._read, self._names = read, tuple(names)

    def __getitem__(self, name: str) -> Iterable[Any]:
        if name not in self._names:
            raise KeyError(name)
        return _Column(self._read, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class _Column:
    read: Read
    name: str

    def __iter__(self) -> Iterator[Any]:
        return (item.fields[self.name] for item in self.read())


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


def features(group: list[Item], head: Head, tokenizer: Tokenizer, context: int) -> dict[str, list[Any]]:
    """Return what the head makes of a group of items, column by column."""
    columns = {name: [item.fields[name] for item in group] for name in group[0].fields}
    return head.encode(columns, tokenizer, context)


def pieces(group: list[Item], head: Head, tokenizer: Tokenizer, context: int) -> Iterator[Piece]:
    """Yield the tokens of a group of items, for a head that joins its rows."""
    names = [name for name in head.texts if name in group[0].fields]
    encoded = features(group, head, tokenizer, context)["ids"]
    for item, ids in zip(group, encoded, strict=True):
        yield Piece(ids, sum(len(item.fields[name].encode()) for name in names), item.document)
