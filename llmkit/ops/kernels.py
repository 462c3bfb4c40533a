"""Kernels in Triton, for NVIDIA and AMD cards. ``llmkit.ops.backend`` imports this module where they can run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.contracts import IGNORE

BLOCK = 4096  # scores that one program reads at once


def cross_entropy_(scores_RV: Tensor, targets_R: Tensor, vocab: int, smoothing: float, gradient: bool) -> Tensor:
    """Return the losses, (R,), in float32; the scores become the gradient of their sum. See ``llmkit.ops.losses``.

    Args:
        scores_RV: contiguous, in float32, bfloat16 or float16; the columns from ``vocab`` on are padding.
        targets_R: target ids, ``IGNORE`` where nothing is to be predicted. The loss of any other id outside the
            vocabulary is NaN.
        vocab: number of columns that count.
        smoothing: label smoothing.
        gradient: False leaves the scores as they are.
    """
    rows, width = scores_RV.shape
    losses_R = torch.empty(rows, dtype=torch.float32, device=scores_RV.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(scores_RV):  # Triton launches on the current device
        _cross_entropy[(rows,)](
            *(scores_RV, targets_R.contiguous(), losses_R, vocab, width, smoothing),
            IGNORED=IGNORE,
            SMOOTH=smoothing != 0,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return losses_R


def try_out(device: torch.device) -> None:
    """Compile and run a kernel; raises whatever is wrong with Triton, its C compiler or the card."""
    cross_entropy_(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device), 2, 0.0, True)


@triton.jit
def _cross_entropy(
    scores: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    smoothing: tl.tensor,
    IGNORED: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocab)
    target_score = tl.load(scores + target, mask=inside, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)

    # Each lane keeps the largest of its scores and the sum of the exponentials relative to it.
    largest = tl.full([BLOCK], -1e30, tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + lanes
        # Masked by the padded width: with an odd limit the loads would not be vectorised.
        x = tl.load(scores + at, mask=at < width, other=0.0).to(tl.float32)
        if SMOOTH:
            total += tl.where(at < vocab, x, 0.0)
        x = tl.where(at < vocab, x, float("-inf"))
        ratio = tl.exp(-tl.abs(x - largest))
        summed = tl.where(x > largest, summed * ratio + 1.0, summed + ratio)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    denominator = tl.sum(summed * tl.exp(largest - top), 0)
    loss = top + tl.log(denominator) - (1.0 - smoothing) * target_score
    if SMOOTH:
        loss -= smoothing * tl.sum(total, 0) / vocab
    tl.store(losses + row, tl.where(target == IGNORED, 0.0, loss))

    if GRADIENT:
        scale = 1.0 / denominator
        for start in range(0, width, BLOCK):
            at = start + lanes
            x = tl.load(scores + at, mask=at < width, other=0.0).to(tl.float32)
            x = tl.exp(x - top) * scale - tl.where(at == target, 1.0 - smoothing, 0.0)
            if SMOOTH:
                x -= smoothing / vocab
            x = tl.where((at < vocab) & (target != IGNORED), x, 0.0)
            tl.store(scores + at, x.to(scores.dtype.element_ty), mask=at < width)
