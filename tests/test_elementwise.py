"""The functions with a gradient of their own, against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.ops import elementwise

SHAPES = [(3, 5, 8), (2, 1, 4), (7, 6)]


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return a function's value and the gradients of a weighted sum of it."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = function(*leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    (value * weights).sum().backward()
    return [value, *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def agree(function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    found, wanted = outcome(function, inputs), outcome(reference, inputs)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 100.0])
def test_rms_norm(shape: tuple[int, ...], size: float) -> None:
    inputs = [torch.randn(shape) * size, torch.randn(shape[-1])]
    agree(lambda x, w: elementwise.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), inputs)


def test_rms_norm_of_zeros_has_no_nan() -> None:
    found = outcome(lambda x, w: elementwise.rms_norm(x, w, 1e-6), [torch.zeros(2, 4), torch.ones(4)])
    assert all(bool(value.isfinite().all()) for value in found)


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_relu(shape: tuple[int, ...]) -> None:
    agree(elementwise.squared_relu, lambda x: F.relu(x) ** 2, [torch.randn(shape)])


def test_rotation() -> None:
    angles = torch.randn(5, 4)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(()), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    agree(lambda x: elementwise.rotate(x, *tables), turned, [torch.randn(2, 3, 5, 8)])


def test_heads_that_lie_across_memory() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    weight = torch.randn(8)
    agree(lambda x, w: elementwise.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, weight])


def test_without_a_gradient_and_in_other_precisions_torch_computes() -> None:
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        assert "_RMSNorm" not in str(elementwise.rms_norm(leaf, torch.ones(8), 1e-6).grad_fn)
    assert elementwise.rms_norm(x, torch.ones(8), 1e-6).grad_fn is None
    # Not a test of nothing: in float32 with a gradient it is ours.
    assert "_RMSNorm" in str(elementwise.rms_norm(x.requires_grad_(), torch.ones(8), 1e-6).grad_fn)
