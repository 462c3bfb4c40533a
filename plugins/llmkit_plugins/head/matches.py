"""Which words of a text stand near words of a question."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import torch
from torch import Tensor

from llmkit_plugins.head.words import Span, words

RADII = (0, 2, 5, 15, 40)
"""How far around a word of the context, in words, words of the question are counted."""


def spans_of(text: str) -> list[Span]:
    """Return where each word of a text begins and ends."""
    return words(text) or [(0, 0)]  # a text without words gets an empty one


def matches_of(question: str, context: str) -> list[int]:
    """Return, for each word of the context, how often it occurs there if it is in the question too, else 0."""
    asked = {question[start:end].lower() for start, end in spans_of(question)}
    there = [context[start:end].lower() for start, end in spans_of(context)]
    counts = Counter(there)
    return [counts[word] if word in asked else 0 for word in there]


def near_matches(matches: list[int]) -> Tensor:
    """Return how many words of the question stand within each radius of each word, (W, radii).

    A word that occurs n times in the context counts 1 / n: it says that much less about the place.
    """
    sums = torch.tensor([0.0, *accumulate(1 / n if n else 0.0 for n in matches)], dtype=torch.float64)
    place, last = torch.arange(len(matches)), len(matches)
    near = [sums[(place + r + 1).clamp(max=last)] - sums[(place - r).clamp(min=0)] for r in RADII]
    return torch.stack(near, -1).float()
