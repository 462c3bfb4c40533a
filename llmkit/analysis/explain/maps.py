"""What each position of a layer rests on, as pictures: tokens by tokens, one for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmkit.analysis.explain.capture import Part, Stack
from llmkit.analysis.explain.jacobian import norms
from llmkit.sequence import Mixing, Sequence

GROUPS = 4
"""Pictures of a variant that has a map for each channel: means over as many groups of neighbouring channels."""
TOLERANCE = 1e-3
"""Largest difference, relative to the largest output, of a map that is called exact; in bfloat16 two roundings."""
WEIGHTS, JACOBIAN = "weights", "Jacobian norm"


@dataclass(frozen=True)
class Map:
    """What the positions of one layer rest on.

    Attributes:
        stack: encoder or decoder.
        layer: its number, from 0.
        part: ``attention`` to the own text, or ``cross``, to the source.
        variant: the class of the layer's attention.
        kind: ``weights``: weights times values are the layer's output. ``Jacobian norm``: the Frobenius norm of the
            derivative of each output by each input.
        how: how exact it is, in words.
        heads: what each picture belongs to.
        weights_HTS: one picture for each, queries by keys, without padding.
        query, key: the numbers of the texts that T and S count, in ``Explanation.texts``.
    """

    stack: Stack
    layer: int
    part: Literal["attention", "cross"]
    variant: str
    kind: str
    how: str
    heads: list[str]
    weights_HTS: Tensor
    query: int = 0
    key: int = 0


@torch.no_grad()
def of(part: Part, row: int, query: int = 0, key: int = 0) -> Map:
    """Return the map of one attention for one row of its pass; the model is in eval mode.

    Args:
        part: the attention.
        row: the row of the batch.
        query: the number of the text of its positions.
        key: that of what it looks at.
    """
    variant = part.module
    name = type(getattr(variant, "variant", variant)).__name__
    mixing = variant.mixing(part.x_BTD, part.seq, memory=part.memory)
    if mixing is None:
        kind, heads = JACOBIAN, ["all channels"]
        norms_TS, how = norms(part, row)
        weights_HTS = norms_TS[None]
    else:
        kind, how = WEIGHTS, _check(mixing, part, row)
        heads, weights_HTS = _pictures(mixing, row)
    queries, keys = real(part.seq, row), real(part.seq if part.memory is None else part.memory.seq, row)
    if queries is not None:
        weights_HTS = weights_HTS[:, queries.cpu()]
    if keys is not None:
        weights_HTS = weights_HTS[:, :, keys.cpu()]
    return Map(part.stack, part.layer, part.kind, name, kind, how, heads, weights_HTS, query, key)


def real(seq: Sequence, row: int) -> Tensor | None:
    """Return which positions of a row are no padding, (T,), or None where there is none."""
    if seq.segments_BT is None:
        return None
    return seq.segments_BT[row if len(seq.segments_BT) > 1 else 0] > 0


def _check(mixing: Mixing, part: Part, row: int) -> str:
    """Return in words by how much weights times values differ from what the layer put out."""
    y_TD, expected_TD, some = mixing.output()[row], part.y_BTD[row], real(part.seq, row)
    if some is not None:
        y_TD, expected_TD = y_TD[some], expected_TD[some]
    gap = float((y_TD - expected_TD).abs().amax() / expected_TD.abs().amax().clamp(min=1e-12))
    if gap <= max(TOLERANCE, 2 * torch.finfo(y_TD.dtype).eps):
        return f"exact: weights times values are the layer's output, to {gap:.0e} of the largest"
    return f"NOT exact: weights times values differ from the layer's output by {gap:.2g} of the largest"


def _pictures(mixing: Mixing, row: int) -> tuple[list[str], Tensor]:
    """Return the pictures of a map, (H, T, S), and their names."""
    count = mixing.values_BHSE.shape[1]
    if mixing.unit == "head":
        return [f"head {head}" for head in range(count)], mixing.of(slice(None))[row].float().cpu()
    names, means = [], []
    size = -(-count // GROUPS)
    for first in range(0, count, size):
        last = min(first + size, count)
        parts = [mixing.of(slice(at, min(at + 8, last)))[row].abs().sum(0) for at in range(first, last, 8)]
        means.append(torch.stack(parts).sum(0) / (last - first))
        names.append(f"mean of channels {first}-{last - 1}")
    return names, torch.stack(means).float().cpu()
