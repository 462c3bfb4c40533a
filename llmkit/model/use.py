"""What it takes to ask a model for answers from outside a run: rows as columns, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from llmkit.contracts import Batch, Head, Network, Tokenizer
from llmkit.data.examples import note_truncated
from llmkit.errors import UserError

Rows = Sequence[str] | Sequence[Mapping[str, Any]]
"""Texts, or rows with the head's fields."""


@runtime_checkable
class Scores(Protocol):
    """A head that can say how probable the model finds a text."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]

    def score(self, net: Network, batch: Batch, /) -> list[dict[str, Any]]:
        """Return the log probability of each row, with its number of tokens and perplexity."""


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


def batch_of(
    head: Head, tokenizer: Tokenizer, context: int, rows: Rows, fields: Sequence[str], first: int = 0
) -> Batch:
    """Return texts or rows as one batch; ``first`` is the number of the first row."""
    features = head.encode(columns_of(rows, fields), tokenizer, context)
    note_truncated(head, features.get("truncated"), len(rows), context)
    items = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    return {**head.collate(items, tokenizer), "rows": torch.arange(first, first + len(rows))}


def columns_of(rows: Rows, fields: Sequence[str]) -> dict[str, list[Any]]:
    """Return rows as columns; a text stands for the first field of a row whose other fields are empty.

    Raises UserError when ``rows`` is a single text or row, or a row lacks a field.
    """
    if isinstance(rows, str | Mapping):
        raise UserError(f"predict takes a list of texts or rows, and got one {type(rows).__name__}: put it in a list")
    given = [row if isinstance(row, Mapping) else {**dict.fromkeys(fields, ""), fields[0]: row} for row in rows]
    for number, row in enumerate(given, 1):
        if missing := [name for name in fields if name not in row]:
            raise UserError(f"predict: row {number} has no {' and no '.join(missing)}; it needs {', '.join(fields)}")
    return {name: [row[name] for row in given] for name in fields} if given else {}
