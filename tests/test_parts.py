"""Feedforward networks and norms against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.contracts import Feedforward, Norm
from llmkit.errors import UserError
from llmkit_plugins.feedforward import GELU, ReLU, SiLU, SquaredReLU, SwiGLU
from llmkit_plugins.norm import LayerNorm, RMSNorm

FEEDFORWARDS: list[type[Any]] = [ReLU, GELU, SquaredReLU, SwiGLU]
NORMS: list[type[Any]] = [LayerNorm, RMSNorm]


def test_kinds() -> None:
    assert all(issubclass(kind, Feedforward) for kind in FEEDFORWARDS)
    assert all(issubclass(kind, Norm) for kind in NORMS)


def scalar(kind: type[Feedforward], x: float, gate: float = 0.0) -> float:
    if kind is ReLU:
        return max(x, 0.0)
    if kind is GELU:
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    if kind is SquaredReLU:
        return max(x, 0.0) ** 2
    return gate / (1 + math.exp(-gate)) * x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FEEDFORWARDS)
def test_feedforward_written_out(kind: type[Any], bias: bool) -> None:
    torch.manual_seed(0)
    module: Any = kind(4, hidden_multiple=2.0, bias=bias)
    assert (module.out.bias is not None) == bias
    x = torch.randn(2, 3, 4)
    hidden = module.inner.weight @ x.unsqueeze(-1)
    hidden = hidden.squeeze(-1) + (module.inner.bias if bias else 0)
    width = module.out.in_features
    values = [[scalar(kind, row[-width + i], row[i]) for i in range(width)] for row in hidden.flatten(0, 1).tolist()]
    expected = torch.tensor(values) @ module.out.weight.T + (module.out.bias if bias else 0)
    torch.testing.assert_close(module(x), expected.view(2, 3, 4))


@pytest.mark.parametrize("multiple", [4.0, 2.5])
@pytest.mark.parametrize("dim", [128, 192, 768])
def test_feedforward_sizes_match(dim: int, multiple: float) -> None:
    sizes = {kind: sum(p.numel() for p in kind(dim, hidden_multiple=multiple).parameters()) for kind in FEEDFORWARDS}
    assert sizes[ReLU] == sizes[GELU] == sizes[SquaredReLU] == 2 * dim * int(multiple * dim)
    swiglu = SwiGLU(dim, hidden_multiple=multiple)
    assert swiglu.out.in_features % 8 == 0
    assert sizes[ReLU] <= sizes[SwiGLU] < sizes[ReLU] + 3 * dim * 8


@pytest.mark.parametrize(
    ("kind", "args", "activation"),
    [
        (GELU, {"approximate": "tanh"}, nn.GELU("tanh")),
        (GELU, {"approximate": "tanh", "gated": True}, nn.GELU("tanh")),
        (ReLU, {"gated": True}, nn.ReLU()),
        (SiLU, {}, nn.SiLU()),
        (SwiGLU, {}, nn.SiLU()),
    ],
)
def test_hidden_width_gates_and_activations(kind: type[Any], args: dict[str, Any], activation: nn.Module) -> None:
    module, x = kind(4, hidden=6, **args), torch.randn(2, 3, 4)
    y = module.inner(x)
    gated = y.shape[-1] == 12
    assert gated == (kind is SwiGLU or "gated" in args)
    torch.testing.assert_close(module(x), module.out(activation(y[..., :6]) * (y[..., 6:] if gated else 1)))
    with pytest.raises(UserError, match="the hidden width must be at least 1, got 0"):
        kind(4, hidden=0)


@pytest.mark.parametrize("kind", FEEDFORWARDS)
def test_feedforward_dropout_only_in_training(kind: type[Any]) -> None:
    module, x = kind(8, dropout=0.5), torch.randn(1, 4, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def with_random_parameters(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_written_out(bias: bool, eps: float) -> None:
    module = LayerNorm(6, eps=eps, bias=bias)
    assert (module.bias is not None) == bias
    with_random_parameters(module)
    x = torch.randn(2, 3, 6)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    expected = (x - mean) / (variance + eps).sqrt() * module.weight + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_written_out(eps: float) -> None:
    module = RMSNorm(6, eps=eps)
    with_random_parameters(module)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(module(x), x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_start_as_plain_normalisation(kind: type[Any]) -> None:
    module = kind(64)
    y: Tensor = module(5 * torch.randn(10, 64))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(10), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("error:Mismatch dtype")
@pytest.mark.parametrize("kind", [*NORMS, *FEEDFORWARDS])
def test_bfloat16(kind: type[Any]) -> None:
    module, x = kind(16), torch.randn(2, 3, 16)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)
    module.bfloat16()
    actual = module(x.bfloat16())
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", [*NORMS, *FEEDFORWARDS])
def test_gradcheck(kind: type[Any]) -> None:
    module = with_random_parameters(kind(6).double())
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()), fast_mode=True)
