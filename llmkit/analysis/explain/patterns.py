"""What heads look at on repeated random tokens: induction, previous token, duplicate, first token, fixed offsets.

Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895. A row is L random tokens, twice. A
head's score is the mean share of its weight on the position that the pattern names; weights of either sign (implicit
maps of recurrences) count by their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.analysis.explain.capture import Recording
from llmkit.analysis.explain.maps import of
from llmkit.analysis.explain.scored import vocabulary_scores
from llmkit.contracts import Tokenizer
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, evaluating
from llmkit.sequence import Sequence as Positions

PATTERNS = ("induction", "previous", "duplicate", "first", "self")
MOST_OFFSET = 16


class HeadScores(NamedTuple):
    """The scores of one head, each between 0 and 1."""

    layer: int
    head: str
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


def pattern_scores(map_BHTT: Tensor, layer: int, heads: Sequence[str]) -> list[HeadScores]:
    """Return the scores of a layer's heads, which are named, from its map on repeated tokens (T is twice as many)."""
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
    both = zip(heads, *columns, best.indices.tolist(), best.values.tolist(), strict=True)
    return [HeadScores(layer, *found) for found in both]


@dataclass(frozen=True)
class Scored:
    """The scores of all heads of one model."""

    kind: str
    """What the maps are: ``weights`` or ``Jacobian norm``; several where layers differ."""
    scores: list[HeadScores]
    losses: tuple[float, float] | None
    """Mean loss in nats of the tokens of the first and of the second copy; None: the head writes no text."""


@torch.no_grad()
def score_heads(model: LanguageModel, ids_BT: Tensor) -> Scored:
    """Return the scores of the heads that read the text: an encoder's, or a decoder's where there is none.

    ``ids_BT``: rows of ``random_ids``.
    """
    net = model.network
    recording = Recording(net)
    ids_BT = ids_BT.to(model.device)
    seq = Positions.of(ids_BT)
    with evaluating(model):
        recording.decode(ids_BT, seq) if net.topology == "decoder" else recording.encode(ids_BT, seq)
        (done,) = recording.passes
        found, kinds = list[HeadScores](), dict[str, None]()
        for part in done.parts:
            maps = [of(part, row) for row in range(len(ids_BT))]
            kinds[maps[0].kind] = None
            found += pattern_scores(torch.stack([one.weights_HTS for one in maps]), part.layer, maps[0].heads)
    losses = None
    if net.topology == "decoder" and isinstance(model.head, Scores):
        scores_BTV = vocabulary_scores(net, done.hidden_BTD)
        nats_BT = F.cross_entropy(scores_BTV[:, :-1].float().mT, ids_BT[:, 1:], reduction="none")
        half = ids_BT.shape[1] // 2
        losses = float(nats_BT[:, : half - 1].mean()), float(nats_BT[:, half:].mean())
    return Scored(", ".join(kinds), found, losses)


def even_scores(length: int, causal: bool) -> HeadScores:
    """Return the scores of a head that looks evenly at all it may look at: what chance would be."""
    ones_TT = torch.ones(2 * length, 2 * length)
    return pattern_scores((ones_TT.tril() if causal else ones_TT)[None, None], 0, ["even"])[0]
