"""The norm of a layer's Jacobian: how much each output would change with each input, where there is no exact map."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmkit.analysis.explain.capture import Part
from llmkit.sequence import Memory, Sequence

EXACT = 2**18
"""Most positions that are computed for an exact Jacobian: a row of the input for each output number."""
WORK = 2**19
"""About how many positions are computed for an estimate."""
AT_ONCE = 2**14
"""Positions that are computed at once."""
PROBES = (8, 2)
"""Random directions for each output: of short texts, and of those whose outputs are taken together."""


class Norms(NamedTuple):
    """Frobenius norms of d y_t / d x_s, (T, S), and how they were computed."""

    norms_TS: Tensor
    how: str


def norms(part: Part, row: int, exact: int = EXACT, work: int = WORK) -> Norms:
    """Return the norms for one row of a pass, in eval mode.

    Rows of a batch do not mix, so that many copies of the row give as many gradients in one pass. Short texts have a
    gradient for each output number. Others are estimated by Hutchinson's method: the squared norm of J^T v has the
    squared Frobenius norm of J as its mean, for v of random signs; very long ones for blocks of neighbouring outputs,
    which share the root mean square of theirs.

    Args:
        part: the attention.
        row: the row of its batch.
        exact: up to this many positions are computed for exact norms.
        work: about how many are computed for estimates.
    """
    _, T, D = part.x_BTD.shape
    S = T if part.memory is None else part.memory.x_BSD.shape[1]
    longest = max(T, S)
    rows = max(1, AT_ONCE // longest)
    if T * D * longest <= exact:
        eye = torch.eye(T * D, dtype=part.x_BTD.dtype).view(-1, T, D)
        return Norms(_squares(part, row, iter(eye.split(rows))).view(T, D, S).sum(1).sqrt(), "exact")
    probes = PROBES[0] if PROBES[0] * T * longest <= work else PROBES[1]
    size = -(-T * probes * longest // work)
    blocks = -(-T // size)
    draw = torch.Generator().manual_seed(0)
    signs_PTD = 2 * torch.randint(2, (probes, T, D), generator=draw) - 1
    member_MT = (torch.arange(T) // size)[None] == torch.arange(blocks)[:, None]
    chunks = (signs_TD * members[..., None] for signs_TD in signs_PTD for members in member_MT.split(rows))
    squares_MS = _squares(part, row, chunks).view(probes, blocks, S).mean(0)
    each_TS = (squares_MS / member_MT.sum(1, keepdim=True)).sqrt().repeat_interleave(size, 0)[:T]
    where = "" if size == 1 else f", {size} neighbouring outputs together"
    return Norms(each_TS, f"estimated from {probes} random directions{where}")


def _squares(part: Part, row: int, directions: Iterator[Tensor]) -> Tensor:
    """Return the squared length of the gradient of each direction's product with the output, by input, (N, S).

    Args:
        part: the attention.
        row: the row of its batch.
        directions: (n, T, D) each, N together.
    """
    found = []
    for directions_nTD in directions:
        count = len(directions_nTD)
        x, memory = part.x_BTD[row].detach().repeat(count, 1, 1), None
        if part.memory is None:
            source = x.requires_grad_()
        else:
            source = part.memory.x_BSD[row].detach().repeat(count, 1, 1).requires_grad_()
            memory = Memory(source, _repeated(part.memory.seq, row, count))
        # cuDNN has no gradient of a recurrence in eval mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            y = part.module(x, _repeated(part.seq, row, count), memory=memory)
            product = (y * directions_nTD.to(y)).sum()
            (grad,) = torch.autograd.grad(product, source, allow_unused=True, materialize_grads=True)
        found.append(grad.square().sum(-1).cpu())
    return torch.cat(found)


def _repeated(seq: Sequence, row: int, count: int) -> Sequence:
    """Return a row of a sequence so many times."""
    positions_bT, segments_bT = seq.positions_BT, seq.segments_BT
    positions = positions_bT if len(positions_bT) == 1 else positions_bT[row : row + 1]
    segments = None
    if segments_bT is not None:
        segments = segments_bT[row if len(segments_bT) > 1 else 0].expand(count, -1)
        positions = positions.expand(count, -1)
    return dataclasses.replace(seq, positions_BT=positions, segments_BT=segments, memo={}, types_BT=None)
