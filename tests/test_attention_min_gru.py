"""The minimal GRU against the plain loop: whole, in pieces, document by document."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_pieces import (
    CUTS,
    SEGMENTS,
    assert_ragged_prompts_then_tokens_and_beams,
    assert_real_equal,
    decode,
    sequence,
    shapes,
)
from torch import Tensor

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Sequence
from llmkit_plugins.attention.min_gru import MinGRU, Scan

DIM = 6
ROLES: list[Role] = ["causal", "bidirectional"]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(module: MinGRU, x_TD: Tensor, segments: list[int]) -> Tensor:
    """Return the outputs of one row, step by step and document by document; zeros at padding."""
    out = torch.zeros_like(x_TD)
    for number in set(segments) - {0}:
        own = [i for i, other in enumerate(segments) if other == number]
        for channel in range(DIM):
            backwards = module.role == "bidirectional" and channel >= DIM // 2
            h = 0.0
            for i in reversed(own) if backwards else own:
                gate = float(module.gate.weight[channel] @ x_TD[i] + module.gate.bias[channel])
                new = float(module.candidate.weight[channel] @ x_TD[i] + module.candidate.bias[channel])
                z = 1 / (1 + math.exp(-gate))
                h = (1 - z) * h + z * new
                out[i, channel] = h
    return out


def loop(keep: Tensor, new: Tensor) -> Tensor:
    """The recurrence as it is written down."""
    h, all_h = torch.zeros_like(new[:, 0]), []
    for t in range(new.shape[1]):
        h = keep[:, t] * h + new[:, t]
        all_h.append(h)
    return torch.stack(all_h, 1)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 33])
def test_scan(length: int) -> None:
    keep = torch.rand(2, length, 3, requires_grad=True)
    new = torch.randn(2, length, 3, requires_grad=True)
    weights = torch.randn(2, length, 3)
    actual, expected = Scan.apply(keep, new), loop(keep, new)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), (keep, new)),
        torch.autograd.grad((expected * weights).sum(), (keep, new)),
    )


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("role", ROLES)
@torch.no_grad()
def test_written_out(role: Role, kind: str) -> None:
    module, x = MinGRU(DIM, role), torch.randn(2, 7, DIM)
    expected = [by_hand(module, x[row], segments) for row, segments in enumerate(SEGMENTS[kind])]
    assert_real_equal(module(x, sequence(kind)), torch.stack(expected), SEGMENTS[kind])


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("kind", SEGMENTS)
@torch.no_grad()
def test_pieces_equal_the_whole(kind: str, cuts: list[int]) -> None:
    module, x, seq = MinGRU(DIM, "causal"), torch.randn(2, 7, DIM), sequence(kind)
    pieces, state = decode(module, x, seq, cuts)
    assert_real_equal(pieces, module(x, seq), SEGMENTS[kind])
    assert shapes(state) == {"h": (2, DIM), "segment": (2,)}


@torch.no_grad()
def test_ragged_prompts_then_tokens_and_beams() -> None:
    assert_ragged_prompts_then_tokens_and_beams(MinGRU(DIM, "causal"))


@pytest.mark.parametrize("role", ROLES)
def test_gradcheck(role: Role) -> None:
    module, seq, x = MinGRU(DIM, role), sequence("packed"), torch.randn(2, 7, DIM, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = module(x, seq)
        return y * (torch.tensor(SEGMENTS["packed"]) > 0)[..., None]

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("role", ROLES)
def test_bfloat16(role: Role, kind: str) -> None:
    module, seq, x = MinGRU(DIM, role), sequence(kind), torch.randn(2, 7, DIM)

    def run(x: Tensor) -> list[Tensor]:
        return [module(x, seq), *([decode(module, x, seq, [4, 1, 2])[0]] if role == "causal" else [])]

    expected = run(x)[0]
    module, x = module.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    module, x = module.bfloat16(), x.bfloat16()
    real = torch.tensor(SEGMENTS[kind]) > 0
    for actual in found + run(x):
        assert actual.dtype is torch.bfloat16
        torch.testing.assert_close(actual[real].double(), expected[real], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [0.0, -8.0, -40.0])
@torch.no_grad()
def test_long_rows(bias: float) -> None:
    """4096 columns in float32 and bfloat16 against the loop in float64, with gates from half open to all but shut."""
    module, x = MinGRU(DIM, "causal"), torch.randn(1, 4096, DIM)
    torch.nn.init.constant_(module.gate.bias, bias)
    torch.nn.init.constant_(module.candidate.bias, 2.0)
    z = module.gate(x).sigmoid()
    expected = loop(1 - z, z * module.candidate(x))
    scale = float(expected.abs().max())
    actual = module.float()(x.float(), Sequence.dense(4096)).double()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)
    half = module.bfloat16()(x.bfloat16(), Sequence.dense(4096)).double()
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05 * scale)


def test_sizes() -> None:
    for role in ROLES:
        assert sum(p.numel() for p in MinGRU(DIM, role).parameters()) == 2 * DIM * DIM + 2 * DIM
    assert MinGRU(DIM, "causal").mixing_flops(100) == 3 * DIM
    assert MinGRU(DIM, "bidirectional").init_state(1, 2, torch.zeros(1)) is None
    with torch.device("meta"):
        assert MinGRU(DIM, "causal")(torch.randn(1, 9, DIM), Sequence.dense(9, "meta")).shape == (1, 9, DIM)


def test_odd_width_for_two_directions() -> None:
    with pytest.raises(UserError, match="dim 5 must be even for two directions; nearest widths: 4, 6"):
        MinGRU(5, "bidirectional")
