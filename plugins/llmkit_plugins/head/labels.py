"""Names of classes: which values of a column are the same class, and which are none."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeVar

from llmkit.errors import UserError, note, unknown

T = TypeVar("T")
MOST_SCORES = 20
"""Numbers with fractions count as scores, not as classes, when there are more different ones than this."""


def class_name(value: Any) -> str:
    """Return the name of the class that a label stands for. Raises UserError for a value that is not one label.

    Text is the same class in any Unicode form (it becomes NFC) and with any white space around or between its words.
    Whole numbers are the same class whether they are written 1 or 1.0.
    """
    if isinstance(value, str):
        name = " ".join(unicodedata.normalize("NFC", value).split())
        if not name:
            raise UserError("the label is empty")
        return name
    if value is None:
        raise UserError("the label is empty (null)")
    if isinstance(value, list | tuple | set):
        need = "a text with any number of labels needs the head multi_label (model.head: multi_label)"
        raise UserError(f"the label is a list, {value!r:.60}: {need}")
    if isinstance(value, Mapping):
        raise UserError(f"the label is a mapping, {value!r:.60}, expected a text or a number")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise UserError(f"the label is {value}, expected a text or a finite number")
        if value == int(value):
            return str(int(value))
    return str(value)


class ClassNumbers:
    """The number of each class, by the labels that stand for it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        # Older checkpoints have names as they were written in the data.
        self._numbers = {name: number for number, name in enumerate(names)}
        for number, name in enumerate(names):
            self._numbers.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), number)

    def __getitem__(self, label: Any) -> int:
        """Return the number of a label's class. Raises UserError for a label that is none of the names."""
        name = class_name(label)
        number = self._numbers.get(name, self._numbers.get(str(label)))
        if number is None:
            raise UserError(unknown("label", name, self.names) + " It was not seen in training.")
        return number


def accepted(values: Iterable[Any], parse: Callable[[Any], T]) -> Iterator[tuple[Any, T]]:
    """Yield values with what ``parse`` makes of them.

    A value that it refuses is left out, because encoding will refuse its row, which ``data.on_bad_row`` may allow.
    Before any value is accepted, its UserError is raised: the first value hints at a wrong setting.
    """
    any_accepted = False
    for value in values:
        try:
            parsed = parse(value)
        except UserError:
            if not any_accepted:
                raise
        else:
            any_accepted = True
            yield value, parsed


def count_classes(labels: Iterable[Any]) -> dict[str, int]:
    """Return how often each class occurs, in the order of their names; empty labels are left out.

    Raises UserError where labels cannot be told apart for certain: a number in two notations, numbers and truth values.
    """
    counts: Counter[str] = Counter()
    written: dict[float, str] = {}  # numbers, and how they are written
    truth = ""  # the name of the first truth value
    given = (label for label in labels if not (isinstance(label, str) and not label.strip()))
    for label, name in accepted(given, class_name):
        if isinstance(label, bool):
            truth = truth or name
        elif name not in counts and (number := _number(name)) is not None:
            other = written.setdefault(number, name)
            if other != name:
                raise UserError(f"the labels '{other}' and '{name}' are the same number: write them alike")
        if truth and written:
            number = next(iter(written))
            raise UserError(f"there are truth values ({truth}) and numbers ({written[number]}) among the labels")
        counts[name] += 1
    _note_alike(counts)
    return dict(sorted(counts.items()))


def refuse_scores(counts: Mapping[str, int]) -> None:
    """Raise UserError when classes look like scores: numbers that hardly ever occur twice, or have many fractions."""
    numbers = [_number(name) for name in counts]
    if not counts or any(number is None for number in numbers):
        return
    half = sum(counts.values()) // 2
    fractions = any(number is not None and number != int(number) for number in numbers)
    if len(counts) > (min(MOST_SCORES, half) if fractions else max(MOST_SCORES, half)):
        first = ", ".join(list(counts)[:3])
        raise UserError(
            f"the labels are {len(counts):,} different numbers ({first}, ...), which looks like scores: "
            "the head regression (model.head: regression) predicts numbers"
        )


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _note_alike(names: Iterable[str]) -> None:
    """Note classes whose names differ in case or width of letters only."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            note(f"the labels {', '.join(map(repr, sorted(group)))} are different classes")
