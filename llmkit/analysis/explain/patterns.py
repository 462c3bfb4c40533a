"""What heads look at on repeated random tokens: induction, previous token, duplicate, first token, fixed offsets.

Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895. A row is L random tokens, twice. A
head's score is the mean share of its weight on the position that the pattern names; weights of either sign (implicit
maps of recurrences) count by their size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkit.contracts import Tokenizer

PATTERNS = ("induction", "previous", "duplicate", "first", "self")
MOST_OFFSET = 16


class HeadScores(NamedTuple):
    """The scores of one head, each between 0 and 1."""

    layer: int
    head: int
    induction: float
    """From a token of the second copy to the token that followed it in the first."""
    previous: float
    """To the token before."""
    duplicate: float
    """From a token of the second copy to the same token in the first."""
    first: float
    """To the first token, from the third on."""
    self: float
    """To the token itself."""
    offset: int
    """The distance back, from 0, whose mean weight is the largest."""
    at_offset: float
    """That weight."""


def random_ids(tokenizer: Tokenizer, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return rows of random tokens, each repeated, (rows, 2 * length); no special ones.

    Within a copy no token comes twice if the vocabulary has enough of them.
    """
    special = {getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos", "unk", "mask", "sep")}
    special |= {number for part in tokenizer.around for number in part}
    allowed = torch.tensor([number for number in range(tokenizer.vocab_size) if number not in special])
    draw = torch.Generator().manual_seed(seed)
    if len(allowed) >= length:
        places = torch.stack([torch.randperm(len(allowed), generator=draw)[:length] for _ in range(rows)])
    else:
        places = torch.randint(len(allowed), (rows, length), generator=draw)
    return allowed[places].repeat(1, 2)


def pattern_scores(map_BHTT: Tensor, layer: int = 0) -> list[HeadScores]:
    """Return the scores of each head of a layer from its map on repeated tokens (T is twice their number)."""
    weights_HTT = map_BHTT.abs()
    weights_HTT = (weights_HTT / weights_HTT.sum(-1, keepdim=True).clamp(min=1e-30)).mean(0)
    length = weights_HTT.shape[-1] // 2

    def back(distance: int, start: int) -> Tensor:
        """Return the mean weight at a distance back, from the queries ``start`` and later, (H,)."""
        return weights_HTT.diagonal(-distance, -2, -1)[:, start - distance :].mean(-1)

    scores = {
        "induction": back(length - 1, length),
        "previous": back(1, 1),
        "duplicate": back(length, length),
        "first": weights_HTT[:, 2:, 0].mean(-1),
        "self": back(0, 0),
    }
    offsets = torch.stack([back(k, k) for k in range(max(1, min(MOST_OFFSET + 1, length - 1)))])
    best = offsets.max(0)
    columns = [scores[name].tolist() for name in PATTERNS]
    both = zip(*columns, best.indices.tolist(), best.values.tolist(), strict=True)
    return [HeadScores(layer, head, *found) for head, found in enumerate(both)]


def even_scores(length: int, causal: bool) -> HeadScores:
    """Return the scores of a head that looks evenly at all it may look at: what chance would be."""
    ones_TT = torch.ones(2 * length, 2 * length)
    return pattern_scores((ones_TT.tril() if causal else ones_TT)[None, None])[0]
