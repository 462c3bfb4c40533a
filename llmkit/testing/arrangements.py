"""Ways to put the same rows into batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from llmkit.contracts import IGNORE, Batch
from llmkit.data.examples import Examples
from llmkit.data.tokens import Blocks, Index, split_batches

SIZES = (2, 3, 8, 64)
Batches = list[Index]
Ways = dict[str, Batches]


class Rows(Protocol):
    """A source of batches: a split of the data, or ``Cut``."""

    def __getitem__(self, rows: Index, /) -> Batch:
        """Return these rows as one batch."""


def chosen(split: Blocks | Examples, count: int) -> Index:
    """Return ``count`` rows of a split, short and long ones, the longest first."""
    order = np.concatenate(split.evaluation_order())
    places = np.linspace(0, len(order) - 1, min(count, len(order))).astype(np.int64)
    longest, *others = order[places]
    return np.array([longest, *np.random.default_rng(0).permutation(others)], np.int64)


def arrangements(split: Blocks | Examples, rows: Index, batch_tokens: int) -> Ways:
    """Return ways to batch the rows that differ from each other, by name; the last one has a row more than once.

    One row at a time is not among them: it is what they are compared with.
    """
    ways = {f"batch size {size}": split_batches(rows, size) for size in SIZES}
    ways["batch size 8, backwards"] = split_batches(rows[::-1], 8)
    ways["batch size 5, shuffled"] = split_batches(np.random.default_rng(1).permutation(rows), 5)
    if isinstance(split, Examples):
        by_tokens = Examples(split.features, split.head, split.tokenizer, 1, batch_tokens)
        kept = [batch[np.isin(batch, rows)] for batch in by_tokens.evaluation_order()]
        ways[f"batch_tokens {batch_tokens}"] = [batch for batch in kept if len(batch)]
        ways["with the longest row"] = [np.array([row, rows[0]]) for row in rows]
    first: dict[str, str] = {}
    for name, batches in ways.items():
        first.setdefault(str([batch.tolist() for batch in batches]), name)
    return {name: ways[name] for name in first.values()}


class Cut:
    """Blocks of a text cut to unequal lengths; several of them are padded to the context, one alone is not."""

    def __init__(self, split: Blocks) -> None:
        self.split = split

    def __getitem__(self, rows: Index) -> Batch:
        """Return rows as one batch with segments."""
        batch, context = self.split[rows], self.split.context
        lengths = torch.tensor([np.random.default_rng(int(row)).integers(1, context + 1) for row in rows])
        width = context if len(rows) > 1 else int(lengths)
        padding = torch.arange(width) >= lengths[:, None]
        ids, targets = batch["ids"][:, :width], batch["targets"][:, :width]
        segments = batch["segments"][:, :width] if "segments" in batch else (ids != self.split.pad_id).long()
        cut = targets.masked_fill(padding, IGNORE)
        return {
            "ids": ids.masked_fill(padding, self.split.pad_id),
            "targets": cut,
            "segments": segments.masked_fill(padding, 0),
            "bytes": int((cut != IGNORE).sum()) * self.split.bytes_per_token,
            "hidden": self.split.hidden_bytes(cut),
        }


def one_by_one(rows: Iterable[int]) -> Batches:
    """Return each row as a batch."""
    return [np.array([row]) for row in rows]


def distinct(ways: Ways) -> list[int]:
    """Return all rows that are batched."""
    return sorted({row for batches in ways.values() for batch in batches for row in batch.tolist()})
