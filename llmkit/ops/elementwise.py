"""Elementwise functions with a gradient written out, for training on a CPU.

There every pass over memory counts, and autograd takes two to three times as many as are needed. Elsewhere, in other
precisions and under torch.compile, the plain functions of torch are used: kernels of one pass exist for them. The
values are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.ops.cpu import computed_again


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square along the last dimension, (..., D), times a weight, (D,)."""
    if _plain(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    y, inverse = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return computed_again(y, _scaled, x, inverse, weight)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) squared."""
    if _plain(x):
        return F.relu(x).square()
    y, positive = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return computed_again(y, torch.square, positive)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i and channel i + E / 2 by an angle.

    Args:
        x: (..., E).
        cos: the angles' cosine, twice: (..., E).
        sin: minus the angles' sine, then their sine: (..., E).
    """
    if torch.compiler.is_compiling():  # halves become one fast loop, rolled channels do not
        (a, b), half = x.chunk(2, -1), x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    if _plain(x):
        return torch.addcmul(x * cos, _swapped(x), sin).to(x.dtype)
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _plain(x: Tensor) -> bool:
    return (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or not (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
    )


def _swapped(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        grad = grads[0]
        size = x.shape[-1]
        # With n = x / rms: d weight = sum of grad n; d x = (grad weight - n mean(grad weight n)) / rms.
        product = (grad * x).reshape(-1, size)
        scale = inverse.reshape(-1)
        along = (product @ weight).mul_(scale).mul_(scale).div_(-size).view_as(inverse)
        grad_x = torch.addcmul(grad * weight, x, along).mul_(inverse)
        return grad_x, scale @ product, None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        ctx.mark_non_differentiable(positive)
        ctx.set_materialize_grads(False)
        return positive * positive, positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grads[0], positive).mul_(2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(_swapped(x), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grads[0] * cos).addcmul_(_swapped(grads[0]), sin, value=-1), None, None
