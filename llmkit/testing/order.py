"""Whether the first batches of an evaluation represent all of them, as ``trainer.limit_val_batches`` assumes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from llmkit.contracts import Stage
from llmkit.data import DataModule
from llmkit.data.examples import Examples

STANDARD_ERRORS = 2
"""How far the first half of the batches may be from all of them, in standard errors of a random half."""


class FirstHalf(NamedTuple):
    """The rows of the first half of the batches, and all rows.

    Attributes:
        what: which mean is compared: that of the rows' lengths or, where all are equally long, of their places.
        whole: the mean of all rows.
        half: the mean of the rows of the first half.
        batches: number of batches in the first half.
        represents: whether the means are as near as those of a random half usually are.
    """

    what: str
    whole: float
    half: float
    batches: int
    represents: bool


def first_half(data: DataModule, stage: Stage = "validation") -> FirstHalf | None:
    """Compare the first half of the batches, in the order of the evaluation loader, with all; None: a single batch.

    Batches by length are planned from the longest to the shortest row, and blocks in the order of their text. Read in
    that order, the first half of six or more batches is usually too far from all. Lengths and places depend on the data
    alone, so that the weights of a model cannot hide what they show.
    """
    loader = data.test_dataloader() if stage == "test" else data.val_dataloader()
    if isinstance(loader, list):
        return None
    batches, split = list(loader.sampler), data.split(stage)
    kept = len(batches) // 2
    if not kept:
        return None
    by_length = isinstance(split, Examples)
    values = [split.lengths[batch] if isinstance(split, Examples) else batch for batch in batches]
    whole, half = (float(np.concatenate(part).mean()) for part in (values, values[:kept]))
    excess = np.array([(part - whole).sum() for part in values])  # sums to zero
    error = float(excess.std()) * math.sqrt(kept * (1 - kept / len(batches)))
    represents = abs(float(excess[:kept].sum())) <= STANDARD_ERRORS * error + 1e-9 * whole
    return FirstHalf("mean length" if by_length else "mean place", whole, half, kept, represents)
