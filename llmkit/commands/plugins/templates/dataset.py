"""A data set: rows that are made, not read from files."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit import register
from llmkit.contracts import Dataset, Stage
from llmkit.errors import UserError


@register("dataset", "template")
class Template(Dataset):
    """Numbers, each of which asks for the next larger one, the last for 0: ``3 15 7`` asks for 4, 0, 8.

    The head ``probe`` reads these rows; columns of other names serve other heads.

    Args:
        length: numbers of a row.
        examples: rows of each split.
        seed: of all draws.
    """

    def __init__(self, length: int = 16, examples: int = 1000, seed: int = 0) -> None:
        if length < 1:
            raise UserError(f"length must be at least 1, got {length}")
        self.length, self.examples, self.seed = length, examples, seed

    def rows(self, split: Stage) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a split, a function of the seed and the split alone. No row is likely to come twice."""
        draw = random.Random(f"{self.seed} {split}")
        for _ in range(self.examples):
            numbers = [draw.randrange(16) for _ in range(self.length)]
            expected = [(number + 1) % 16 for number in numbers]
            yield {"symbols": " ".join(map(str, numbers)), "expected": " ".join(map(str, expected))}
