"""What it takes to ask a model for answers from outside a run: rows as columns, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmkit.errors import UserError


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def columns_of(rows: Sequence[str] | Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, list[Any]]:
    """Return rows as columns, {} for none; a text stands for the first field of a row whose other fields are empty.

    Raises UserError when ``rows`` is a single text or row, or a row lacks a field.
    """
    if isinstance(rows, str | Mapping):
        raise UserError(f"predict takes a list of texts or rows, and got one {type(rows).__name__}: put it in a list")
    given = [row if isinstance(row, Mapping) else {**dict.fromkeys(fields, ""), fields[0]: row} for row in rows]
    for number, row in enumerate(given, 1):
        if missing := [name for name in fields if name not in row]:
            raise UserError(f"predict: row {number} has no {' and no '.join(missing)}; it needs {', '.join(fields)}")
    return {name: [row[name] for row in given] for name in fields} if given else {}
