"""Cross-entropy straight from hidden states: the scores over a large vocabulary never exist whole.

The scores of a chunk of rows are multiplied out into one buffer. There they become their own gradient, which is
multiplied at once with the output matrix and with the hidden states. Only the step between the products exists twice:
``plain_cross_entropy_`` defines it, ``llmkit.ops.kernels`` does it on a GPU in two reads and one write of the scores.
(torch.compile would be no third way: on a GPU it needs Triton as well.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.contracts import IGNORE, Loss
from llmkit.ops.backend import autocast_dtype, backend, without_autocast
from llmkit.ops.distillation import SoftTargets, distilled

CHUNK_ELEMENTS = 2**22  # scores held at once on a CPU: 512 rows at a vocabulary of 8192
CHUNK_ELSEWHERE = 2**26  # an accelerator needs large products: 1,280 rows at a vocabulary of 50304
ROWS = 64
"""Products have a multiple of this many rows. On a CPU in bf16, oneDNN compiles a kernel for each new number of rows
and keeps it (0.26 MiB) for good, and the number of targets of a batch is nearly always new."""
CHUNK_BYTES = 3 * 2**27  # a kernel needs no memory besides the scores: 4,002 rows at a vocabulary of 50304 in bfloat16
MULTIPLE = {"cpu": 1}
"""What the columns of the scores are padded to a multiple of, by device; else 64."""

SHAPES_ONLY = ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Compute no more than two chunks of a loss within this block, where only shapes and memory count.

    Later chunks hold what the second one does. There are 256 of them in a batch of GPT-2's size on a CPU.
    """
    before = SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        SHAPES_ONLY.reset(before)


def rows_at_once(weight_VD: Tensor) -> int:
    """Return for how many rows the scores over the vocabulary are held at once."""
    elements = CHUNK_ELEMENTS if weight_VD.device.type == "cpu" else CHUNK_ELSEWHERE
    rows = max(1, elements // len(weight_VD))
    return rows // ROWS * ROWS or rows


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    label_smoothing: float = 0.0,
    bias_V: Tensor | None = None,
    soft: SoftTargets | None = None,
) -> Loss:
    """Return the summed cross-entropy of ``hidden @ weight.T + bias`` and the number of targets that count.

    The gradient is computed chunk by chunk during the forward pass, so that memory does not grow with N x V.

    Args:
        hidden_ND: hidden states, (N, D).
        weight_VD: output matrix, (V, D).
        targets_N: target ids, ``IGNORE`` where nothing is to be predicted.
        label_smoothing: share of the probability spread evenly over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567).
        bias_V: what is added to the scores; None: nothing.
        soft: a teacher's scores of the same rows, which the loss is mixed with; None: there is no teacher.
    """
    keep = targets_N != IGNORE
    count = keep.sum()
    # Skipping padded rows saves their arithmetic; on an accelerator the row count would force a synchronisation.
    if hidden_ND.device.type == "cpu" and int(count) < len(targets_N):
        rest = -int(count) % ROWS
        hidden_ND = F.pad(hidden_ND[keep], (0, 0, 0, rest))
        targets_N = F.pad(targets_N[keep], (0, rest), value=IGNORE)
        if soft is not None:
            theirs_ND = F.pad(soft.logits.hidden_ND[keep], (0, 0, 0, rest))
            soft = soft._replace(logits=soft.logits._replace(hidden_ND=theirs_ND))
    # Inside an autograd function gradients always look switched off, so pass on whether they are.
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, label_smoothing, torch.is_grad_enabled(), bias_V, soft
    )
    return Loss(total, count)


def plain_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    label_smoothing: float = 0.0,
    bias_V: Tensor | None = None,
    soft: SoftTargets | None = None,
) -> Loss:
    """Define ``linear_cross_entropy``: torch's cross-entropy of the whole scores, (N, V)."""
    scores_NV = F.linear(hidden_ND, weight_VD, bias_V)
    scores_NV = scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32))
    total = F.cross_entropy(scores_NV, targets_N, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    keep = targets_N != IGNORE
    if soft is not None:
        theirs = soft.logits._replace(hidden_ND=soft.logits.hidden_ND[keep])
        total = distilled(total, scores_NV[keep], soft._replace(logits=theirs))
    return Loss(total, keep.sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        training: bool,
        bias: Tensor | None,
        soft: SoftTargets | None,
    ) -> Tensor:
        need_hidden, need_weight = (training and need for need in ctx.needs_input_grad[:2])
        need_bias = training and ctx.needs_input_grad[5]
        low = autocast_dtype(hidden) or hidden.dtype
        exact = torch.promote_types(low, torch.float32)  # softmax and sums are never done in half precision
        hidden_low, weight_low = hidden.to(low), padded_to_multiple(weight, low)
        triton = soft is None and backend(hidden_low, triton=True) == "triton"
        limit = max(1, CHUNK_BYTES // (len(weight_low) * low.itemsize)) if triton else rows_at_once(weight)
        chunks = max(1, math.ceil(len(targets) / limit))
        rows = max(1, math.ceil(len(targets) / chunks))  # chunks of one size: a small one is slow
        rows = math.ceil(rows / ROWS) * ROWS if rows > ROWS else rows
        scores = hidden_low.new_empty(rows, len(weight_low))
        theirs = None if soft is None else _TeacherScores(soft, low, rows)
        total = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden_low) if need_hidden else None
        grad_weight = torch.zeros_like(weight_low, dtype=exact) if need_weight else None
        bias_low = None if bias is None else F.pad(bias, (0, len(weight_low) - len(bias))).to(low)
        grad_bias = hidden.new_zeros(len(weight_low), dtype=exact) if need_bias else None
        need_any = need_hidden or need_weight or need_bias
        with without_autocast(hidden):
            for start in range(0, len(targets), rows)[: 2 if SHAPES_ONLY.get() else None]:
                states, ids = hidden_low[start : start + rows], targets[start : start + rows]
                grad = torch.mm(states, weight_low.T, out=scores[: len(ids)])
                if bias_low is not None:
                    grad += bias_low
                if theirs is None:
                    total += cross_entropy_(grad, ids, len(weight), smoothing, need_any, triton).sum()
                else:
                    both = grad[:, : len(weight)], theirs.of_rows(start, len(ids))
                    total += plain_distilled_(*both, ids, smoothing, theirs.soft, need_any).sum()
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=exact)
                if grad_hidden is not None:
                    torch.mm(grad, weight_low, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    if low == exact:
                        grad_weight.addmm_(grad.T, states)
                    else:  # adding up in half precision would round once more for each chunk
                        grad_weight += grad.T @ states
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight[: len(weight)].to(weight.dtype),
            None if grad_bias is None else grad_bias[: len(weight)].to(weight.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, weight, None, None, None, bias, None


class _TeacherScores:
    """Scores of a teacher, multiplied out for some rows at a time into one buffer of ``rows`` rows."""

    def __init__(self, soft: SoftTargets, dtype: torch.dtype, rows: int) -> None:
        hidden_ND, weight_VD, bias_V = soft.logits
        self.soft, self.vocab = soft, len(weight_VD)
        self.hidden_ND, self.weight_VD = hidden_ND.to(dtype), padded_to_multiple(weight_VD, dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.buffer = self.hidden_ND.new_empty(rows, len(self.weight_VD))

    def of_rows(self, start: int, count: int) -> Tensor:
        """Return the scores of ``count`` rows from ``start`` on, (count, V)."""
        states_RD = self.hidden_ND[start : start + count]
        scores_RV = torch.mm(states_RD, self.weight_VD.T, out=self.buffer[:count])[:, : self.vocab]
        return scores_RV if self.bias_V is None else scores_RV.add_(self.bias_V)


def padded_to_multiple(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output matrix in a dtype, on an accelerator with rows of zeros up to a multiple of 64.

    The fast kernels of a GPU ask for rows of scores that begin at multiples of 16 bytes: at a vocabulary of 50,260 the
    three products take an H200 three times as long as at 50,304. This copy, which the cast to half precision makes
    anyway, is all that is padded; parameters, optimizer state, checkpoints and counts have V rows. The scores of the
    rows of zeros are left out of the loss, and the last rows of the gradient are dropped.
    """
    vocab, dim = weight_VD.shape
    missing = -vocab % MULTIPLE.get(weight_VD.device.type, 64)
    if not missing:
        return weight_VD.to(dtype)
    padded = weight_VD.new_zeros(vocab + missing, dim, dtype=dtype)
    padded[:vocab].copy_(weight_VD)
    return padded


def cross_entropy_(
    scores_RV: Tensor, targets_R: Tensor, vocab: int, smoothing: float, gradient: bool, triton: bool
) -> Tensor:
    """Return the losses, (R,), at least in float32; the scores become the gradient of their sum.

    Args:
        scores_RV: the scores; the columns from ``vocab`` on are padding, and zero.
        targets_R: target ids, ``IGNORE`` where nothing is to be predicted.
        vocab: number of columns that count.
        smoothing: label smoothing.
        gradient: whether the gradient is needed; otherwise the scores are left undefined.
        triton: whether to use the kernel.
    """
    if triton:
        from llmkit.ops import kernels

        return kernels.cross_entropy_(scores_RV, targets_R, vocab, smoothing, gradient)
    return plain_cross_entropy_(scores_RV[:, :vocab], targets_R, smoothing, gradient)


def plain_cross_entropy_(scores_RV: Tensor, targets_R: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """Define ``cross_entropy_`` for scores without padding."""
    exact_RV = scores_RV.to(torch.promote_types(scores_RV.dtype, torch.float32)).contiguous()
    kept_R1, target_R1 = (targets_R != IGNORE)[:, None], targets_R.clamp(min=0)[:, None]
    losses_R1 = exact_RV.amax(-1, keepdim=True) - (1 - smoothing) * exact_RV.gather(-1, target_R1)
    if smoothing:
        losses_R1 -= smoothing * exact_RV.mean(-1, keepdim=True)
    # The softmax is one pass of a fast kernel, and its largest value gives the logarithm of its sum.
    in_place = exact_RV.device.type == "cpu"  # where it is known to be right
    exact_RV = torch.softmax(exact_RV, -1, out=exact_RV if in_place else None)
    losses_R1 -= exact_RV.amax(-1, keepdim=True).log()
    if gradient:  # softmax - smoothed one-hot target
        if smoothing:
            exact_RV -= smoothing / exact_RV.shape[-1]
        exact_RV.scatter_add_(-1, target_R1, torch.full_like(losses_R1, smoothing - 1))
        if exact_RV.device.type != "cpu" or not bool(kept_R1.all()):  # a look that costs less than a pass, on a CPU
            exact_RV.mul_(kept_R1)
        if exact_RV is not scores_RV:
            scores_RV.copy_(exact_RV)
    return (losses_R1 * kept_R1).squeeze(-1)


def plain_distilled_(
    scores_RV: Tensor, theirs_RV: Tensor, targets_R: Tensor, smoothing: float, soft: SoftTargets, gradient: bool
) -> Tensor:
    """Return the losses, (R,), of scores mixed with their distance from a teacher's; arguments as ``cross_entropy_``.

    With p and q the softmax of the teacher's and of the own scores over the temperature T, the gradient of
    ``T^2 * KL(p || q)`` is ``T * (q - p)``.
    """
    exact = torch.promote_types(scores_RV.dtype, torch.float32)
    kept_R = targets_R != IGNORE
    log_q_RV = (scores_RV.to(exact) / soft.temperature).log_softmax(-1)
    log_p_RV = (theirs_RV.to(exact) / soft.temperature).log_softmax(-1)
    p_RV = log_p_RV.exp()
    soft_R = log_p_RV.sub_(log_q_RV).mul_(p_RV).sum(-1) * soft.temperature**2
    exact_RV = scores_RV.to(exact)
    hard_R = plain_cross_entropy_(exact_RV, targets_R, smoothing, gradient)
    if gradient:
        difference_RV = log_q_RV.exp_().sub_(p_RV).mul_(kept_R[:, None])
        exact_RV.mul_(1 - soft.weight).add_(difference_RV, alpha=soft.weight * soft.temperature)
        if exact_RV is not scores_RV:
            scores_RV.copy_(exact_RV)
    return soft.weight * soft_R * kept_R + (1 - soft.weight) * hard_R
