"""Training rows drawn by class, so that rare classes are trained on as often as frequent ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.data.batches import halved
from llmkit.data.examples import Examples, Features
from llmkit.data.tokens import Blocks, Index
from llmkit.errors import Problem, UserError


@dataclass(frozen=True)
class Balanced:
    """The order of epochs whose rows are drawn with replacement, as many as there are.

    Args:
        split: the training rows.
        chances: of each row to be the next one drawn.
    """

    split: Examples
    chances: NDArray[np.float64]

    @classmethod
    def of(cls, split: Blocks | Examples, balance: float) -> Balanced:
        """Return the order in which a class of n rows is drawn in proportion to n to the power of 1 - ``balance``.

        Raises UserError for a head whose rows do not have one class each.
        """
        if not isinstance(split, Examples):
            raise UserError(Problem("data.balance", "is for heads with one class a row (classification)"))
        values, ends = split.features.values, split.features.ends
        names = [name for name in split.head.classes if name in values and name not in ends]
        if len(names) != 1:
            text = f"is for heads with one class a row (classification), not for {type(split.head).__name__}"
            raise UserError(Problem("data.balance", text))
        _, numbers, counts = np.unique(values[names[0]], return_inverse=True, return_counts=True)
        weights = (counts.astype(np.float64) ** -balance)[numbers]
        return cls(split, weights / weights.sum())

    def training_order(self, rng: np.random.Generator) -> Sequence[Index]:
        """Return the batches of an epoch, as many as without balance."""
        split = self.split
        rows = rng.choice(len(split), len(split), p=self.chances)
        drawn = Features({"length": split.lengths[rows]}, {})
        order = Examples(drawn, split.head, split.tokenizer, split.batch_size, split.batch_tokens).training_order(rng)
        # Batches are in random order: those left out, if the rows drawn are long, are a random part.
        return [rows[batch] for batch in halved(order, split.num_batches)[: split.num_batches]]
