"""The fast ways of elementwise functions against the plain ones, drawn by hypothesis, and in a whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import decided
from torch import Tensor

from llmkit.ops.backend import backend
from llmkit.ops.elementwise import Dropout, plain_rms_norm, rms_norm, rotate
from llmkit.ops.losses import linear_cross_entropy
from llmkit.sequence import Sequence

EXACT, LOW = (1e-5, 1e-6), (2e-2, 2e-2)  # relative and absolute tolerances
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return a function's value and the gradients of a weighted sum of it."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = function(*leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    (value * weights).sum().backward()
    return [value, *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def agree(actual: list[Tensor], expected: list[Tensor], rtol: float, atol: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@settings(deadline=None)
@given(
    shape=sizes,
    width=st.integers(1, 40),
    size=st.sampled_from([1.0, 1e-3, 100.0]),
    dtypes=st.sampled_from([(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]),
    autocast=st.booleans(),
    across=st.booleans(),
)
def test_rms_norm(
    shape: list[int],
    width: int,
    size: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: bool,
    across: bool,
) -> None:
    x = torch.randn(*shape, width).mul_(size).to(dtypes[0])
    if across:  # heads are a view whose last two dimensions do not lie next to each other
        x = torch.randn(width, *shape).mul_(size).to(dtypes[0]).movedim(0, -1)
    weight = torch.randn(width).to(dtypes[1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # the backward pass runs under it too
        fast = outcome(lambda x, w: rms_norm(x, w, 1e-6), [x, weight])
    exact = outcome(lambda x, w: plain_rms_norm(x, w, 1e-6), [x.double(), weight.double()])
    rtol, atol = LOW if torch.bfloat16 in dtypes else EXACT
    # The terms of the input's gradient, which nearly cancel each other in narrow inputs, are as large as weight / rms.
    term = weight.double().abs().max() * (x.double().square().mean(-1) + 1e-6).rsqrt().max()
    for one, other, dtype, least in zip(fast, exact, (dtypes[0], *dtypes), (0.0, float(term), 1.0), strict=True):
        assert one.dtype == dtype
        scale = other.abs().max().clamp_min(max(least, 1e-6))
        torch.testing.assert_close(one.double() / scale, other / scale, rtol=rtol, atol=atol)


def test_rms_norm_of_zeros_has_no_nan() -> None:
    found = outcome(lambda x, w: rms_norm(x, w, 1e-6), [torch.zeros(2, 4), torch.ones(4)])
    assert all(bool(value.isfinite().all()) for value in found)


def test_a_second_gradient_is_refused_rather_than_wrong() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(6), 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@settings(deadline=None)
@given(
    shape=sizes,
    half=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    compiling=st.booleans(),
)
def test_rotation(shape: list[int], half: int, dtype: torch.dtype, compiling: bool) -> None:
    angles = torch.randn(*shape, half)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.float().chunk(2, -1)) * torch.polar(torch.ones(()), angles)
        return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)

    tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    x = torch.randn(2, *shape, 2 * half).to(dtype)
    tolerance = EXACT if dtype == torch.float32 else LOW
    with mock.patch("torch.compiler.is_compiling", return_value=compiling):
        actual = outcome(lambda x: rotate(x, *tables), [x])
    agree(actual, outcome(turned, [x]), *tolerance)


def test_what_the_rule_chooses() -> None:
    x = torch.randn(3, 8)
    assert backend(x) == "plain"  # there is no gradient to save
    x.requires_grad_()
    assert backend(x) == backend(x.bfloat16()) == "cpu"
    assert backend(x.double()) == backend(x.to("meta")) == "plain"
    with torch.no_grad():
        assert backend(x) == "plain"
    assert "_RMSNorm" in str(rms_norm(x, torch.ones(8), 1e-6).grad_fn)
    assert "_RMSNorm" not in str(rms_norm(x.double(), torch.ones(8), 1e-6).grad_fn)
    assert (
        torch.compile(lambda x: rms_norm(x, torch.ones(8), 1e-6), backend="eager", fullgraph=True)(x).shape == x.shape
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float) -> None:
    layer = Dropout(p)
    x = torch.randn(400, 500).abs_().add_(1).requires_grad_()
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[kept], (x[kept].double() / (1 - p)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, (kept.double() / (1 - p)).float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, layer(x))


def test_dropout_is_a_function_of_the_seed() -> None:
    x = torch.randn(5, 60, requires_grad=True)
    torch.manual_seed(1)
    first = Dropout(0.5)(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first) and torch.equal(torch.get_rng_state(), state)


def test_dropout_does_nothing_outside_training_and_is_torchs_elsewhere() -> None:
    layer = Dropout(0.5)
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    for value in (x.double(), x.bfloat16(), x.detach()):
        torch.manual_seed(1)
        found = layer(value)
        torch.manual_seed(1)
        assert torch.equal(found, F.dropout(value, 0.5))
    assert not Dropout(1.0)(x).any()


@pytest.mark.parametrize("feedforward", ["squared_relu", "gelu", "swiglu"])
@pytest.mark.parametrize("attention", ["multi_head", "linear", "lstm", "latent"])
def test_a_network_learns_the_same(attention: str, feedforward: str) -> None:
    fast = decided(attention, feedforward=feedforward)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.div_(8)  # a network that is sure of itself has gradients that say little
    plain = copy.deepcopy(fast).double()  # the rule has plain functions for float64
    ids = torch.randint(29, (3, 17))
    losses = []
    for net in (fast, plain):
        hidden = net.decode(ids, Sequence.of(ids)).flatten(0, 1)
        losses.append(linear_cross_entropy(hidden, net.output_weight_VD, ids.flatten()).total)
        losses[-1].backward()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    for (name, one), other in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        error = (one.grad.double() - other.grad).norm() / other.grad.norm().clamp_min(1e-6)
        assert error < 1e-4, f"{name}: {error}"
