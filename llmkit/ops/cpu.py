"""Layers for training on a CPU: faster kernels than torch takes, and inputs that are computed again, not kept."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula


class _Recipe(NamedTuple):
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int  # of the result: one that was changed in place since is another


def computed_again(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return y, marked as ``function(*inputs)``: a ``Linear`` that reads it keeps the inputs for its gradient.

    That saves y's memory where the inputs are kept anyway, at the price of computing y twice.
    """
    y._llmkit_recipe = _Recipe(function, inputs, y._version)  # type: ignore[attr-defined]
    return y


class Linear(nn.Linear):
    """``nn.Linear``, but in fp32 on an x86 CPU large products are made by oneDNN, where torch would call MKL.

    Output and gradient are the same up to rounding. On the AMD Zen 4 it was measured on, oneDNN is 5 to 15 % faster.
    A tiny step would take half as long again for a function of our own, so small products are left to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``, (..., in_features) to (..., out_features)."""
        if not _has_kernel(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return times(input, self.weight, self.bias)
        recipe: _Recipe | None = getattr(input, "_llmkit_recipe", None)
        if recipe is not None and recipe.version != input._version:
            recipe = None
        y: Tensor = _Linear.apply(input, self.weight, self.bias, recipe)  # type: ignore[no-untyped-call]
        return y


class Dropout(nn.Dropout):
    """``nn.Dropout``, but in fp32 on a CPU from uniform numbers: drawing Bernoulli ones takes torch twice as long."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with each value either zero, with probability p, or divided by 1 - p."""
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or torch.compiler.is_compiling()
        if plain or not self.training or self.p >= 1:
            return F.dropout(input, self.p, self.training)
        return input * torch.rand_like(input, requires_grad=False).ge_(self.p).mul_(1 / (1 - self.p))


OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Dropout: Dropout}


def use_cpu_layers(module: nn.Module) -> None:
    """Turn every ``nn.Linear`` and ``nn.Dropout`` of a module into ours; their subclasses are left as they are.

    On other devices, in other precisions and under torch.compile these do what torch's do.
    """
    for part in module.modules():
        part.__class__ = OURS.get(type(part), type(part))


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, without a gradient of its own.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,).
    """
    if not _has_kernel(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


LEAST = 2**27
"""Multiplications of a product from which on oneDNN gains more than calling it costs."""
_X86 = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        _X86
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: _Recipe | None) -> Tensor:
        ctx.function = None if recipe is None else recipe.function
        ctx.save_for_backward(weight, *((x,) if recipe is None else recipe.inputs))
        return times(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, *inputs = ctx.saved_tensors
        (grad,) = grads
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = times(grad, weight.T) if need_x else None
        grad_weight = grad_bias = None
        if need_weight:
            x = inputs[0] if ctx.function is None else ctx.function(*inputs)
            grad_weight = grad.reshape(-1, weight.shape[0]).T @ x.reshape(-1, weight.shape[1])
        if need_bias:
            grad_bias = grad.reshape(-1, weight.shape[0]).sum(0)
        return grad_x, grad_weight, grad_bias, None


if _X86:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * x.numel() * weight[0]
