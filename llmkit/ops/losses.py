"""Cross-entropy straight from hidden states: the scores over a large vocabulary never exist whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.contracts import IGNORE, Loss

CHUNK_ELEMENTS = 2**22  # scores held at once on a CPU: 512 rows at a vocabulary of 8192
CHUNK_ELSEWHERE = 2**26  # an accelerator needs large products: 1,280 rows at a vocabulary of 50304
ROWS = 64
"""Products have a multiple of this many rows. On a CPU in bf16, oneDNN compiles a kernel for each new number of rows
and keeps it (0.26 MiB) for good, and the number of targets of a batch is nearly always new."""


def rows_at_once(weight_VD: Tensor) -> int:
    """Return for how many rows the scores over the vocabulary are held at once."""
    elements = CHUNK_ELEMENTS if weight_VD.device.type == "cpu" else CHUNK_ELSEWHERE
    rows = max(1, elements // len(weight_VD))
    return rows // ROWS * ROWS or rows


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Return the summed cross-entropy of ``hidden @ weight.T`` and the number of targets that count.

    The gradient is computed chunk by chunk during the forward pass, so that memory does not grow with N x V.

    Args:
        hidden_ND: hidden states, (N, D).
        weight_VD: output matrix, (V, D).
        targets_N: target ids, ``IGNORE`` where nothing is to be predicted.
        label_smoothing: share of the probability spread evenly over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567).
    """
    keep = targets_N != IGNORE
    count = keep.sum()
    # Skipping padded rows saves their arithmetic; on an accelerator the row count would force a synchronisation.
    if hidden_ND.device.type == "cpu" and int(count) < len(targets_N):
        rest = -int(count) % ROWS
        hidden_ND = F.pad(hidden_ND[keep], (0, 0, 0, rest))
        targets_N = F.pad(targets_N[keep], (0, rest), value=IGNORE)
    # Inside an autograd function gradients always look switched off, so pass on whether they are.
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, label_smoothing, torch.is_grad_enabled()
    )
    return Loss(total, count)


def plain_linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, label_smoothing: float = 0.0
) -> Loss:
    """Define ``linear_cross_entropy``: torch's cross-entropy of the whole scores, (N, V)."""
    scores_NV = F.linear(hidden_ND, weight_VD)
    scores_NV = scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32))
    total = F.cross_entropy(scores_NV, targets_N, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    return Loss(total, (targets_N != IGNORE).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, training: bool) -> Tensor:
        need_hidden, need_weight = (training and need for need in ctx.needs_input_grad[:2])
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden_low, weight_low = hidden.to(low), weight.to(low)
        exact = torch.promote_types(low, torch.float32)  # softmax and sums are never done in half precision
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        vocab = weight.shape[0]
        with torch.autocast(device, enabled=False):
            rows = rows_at_once(weight)
            for start in range(0, len(targets), rows):
                span = slice(start, start + rows)
                scores = (hidden_low[span] @ weight_low.T).to(exact)
                kept = targets[span] != IGNORE
                target = targets[span].clamp(min=0)[:, None]
                # The softmax is one pass of a fast kernel, and its largest value gives the logarithm of its sum.
                grad = scores.softmax(-1)
                norm = scores.amax(-1, keepdim=True) - grad.amax(-1, keepdim=True).log()
                losses = norm - (1 - smoothing) * scores.gather(-1, target)
                if smoothing:
                    losses -= smoothing * scores.mean(-1, keepdim=True)
                total += (losses * kept[:, None]).sum()
                if not (need_hidden or need_weight):
                    continue
                # d loss / d scores = softmax - smoothed one-hot target
                if smoothing:
                    grad -= smoothing / vocab
                grad.scatter_add_(-1, target, torch.full_like(norm, smoothing - 1))
                grad_low = grad.mul_(kept[:, None]).to(low)
                if grad_hidden is not None:
                    grad_hidden[span] = (grad_low @ weight_low).to(hidden.dtype)
                if grad_weight is not None:
                    if low == exact:
                        grad_weight.addmm_(grad_low.T, hidden_low[span])
                    else:
                        grad_weight += grad_low.T @ hidden_low[span]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight = (None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, weight, None, None, None
