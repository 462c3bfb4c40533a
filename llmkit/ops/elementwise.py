"""Elementwise functions: the plain definition of each, and where it pays a faster way of the same result.

``backend`` chooses. The results agree up to rounding; dropout's masks are drawn differently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit.ops.backend import backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square along the last dimension, (..., D), times a weight, (D,), in x's dtype."""
    if backend(x) == "plain":
        return plain_rms_norm(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x.float(), weight.float(), eps)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Define ``rms_norm``: x / sqrt(mean(x^2) + eps) * weight."""
    # Under autocast torch returns float32 on a GPU, and queries and keys would be rotated in it.
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y: Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        grad, size = grads[0], x.shape[-1]
        # With n = x / rms: d weight = sum of grad n; d x = (grad weight - n mean(grad weight n)) / rms.
        product, scale = (grad * x).reshape(-1, size), inverse.reshape(-1)
        with torch.autocast("cpu", enabled=False):  # a backward pass may run under autocast too
            along = (product @ weight).mul_(scale).mul_(scale).div_(-size).view_as(inverse)
            grad_weight = scale @ product
        return torch.addcmul(grad * weight, x, along).mul_(inverse), grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i and channel i + E / 2 by an angle.

    Args:
        x: (..., E).
        cos: the angles' cosine, twice: (..., E).
        sin: minus the angles' sine, then their sine: (..., E).
    """
    half = x.shape[-1] // 2
    # On a CPU, compiled halves become one fast loop and rolled channels do not; eagerly it is reversed. For a GPU,
    # inductor writes fewer kernels for rolled channels, and they read and write less.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        (a, b), cos, sin = x.chunk(2, -1), cos[..., :half], sin[..., half:]
        turned = a * cos - b * sin, b * cos + a * sin
        return torch.cat([part.to(x.dtype) for part in turned], -1)  # cat writes what it gets: float32 would cost twice
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype)


class Dropout(nn.Dropout):
    """``nn.Dropout``, on a CPU in float32 with a mask from uniform numbers: Bernoulli ones take torch twice as long."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with each value either zero, with probability p, or divided by 1 - p."""
        if not self.training or self.p == 0:
            return input
        if self.p == 1 or backend(input) != "cpu" or input.dtype != torch.float32:  # in bfloat16 nothing is gained
            return F.dropout(input, self.p)
        return input * torch.rand_like(input, requires_grad=False).ge_(self.p).mul_(1 / (1 - self.p))
