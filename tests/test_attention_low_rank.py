"""Low-rank mixing against plain loops: whole, in chunks, in pieces; and that its matrix is what it is said to be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_pieces import (
    CUTS,
    SEGMENTS,
    assert_cross_state_keeps_the_memory,
    assert_ragged_prompts_then_tokens_and_beams,
    assert_real_equal,
    decode,
    sequence,
    shapes,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence
from llmkit_plugins.attention import chunked
from llmkit_plugins.attention.low_rank import LowRank

DIM, RANK = 6, 3
ROLES: list[Role] = ["causal", "bidirectional", "cross"]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[3, 128])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks that end within the rows, and one chunk for all."""
    monkeypatch.setattr(chunked, "CHUNK", request.param)
    return int(request.param)


def by_hand(
    module: LowRank, x_TD: Tensor, segments: list[int], source_SD: Tensor, source_segments: list[int]
) -> Tensor:
    """Return the outputs of one row, slot by slot; zeros at padding."""
    rows = torch.zeros_like(x_TD)
    for i, segment in enumerate(segments):
        if not segment:
            continue
        seen = [j for j, other in enumerate(source_segments) if other == segment]
        if module.role == "causal":
            seen = [j for j in seen if j <= i]
        scores = [math.exp(float(module.read.weight[k] @ x_TD[i] + module.read.bias[k])) for k in range(module.rank)]
        mixed = torch.zeros_like(x_TD[i])
        for k in range(module.rank):
            written = {
                j: 1 / (1 + math.exp(-float(module.write.weight[k] @ source_SD[j] + module.write.bias[k]))) + 1e-4
                for j in seen
            }
            for j, weight in written.items():
                share = scores[k] / sum(scores) * weight / sum(written.values())
                mixed += share * (module.value.weight @ source_SD[j])
        rows[i] = module.out.weight @ mixed
    return rows


def build(role: Role, dim: int = DIM) -> LowRank:
    """Build a module with slots that differ much, in who writes and in who reads them."""
    module = LowRank(dim, role, rank=RANK)
    for part in (module.read, module.write):
        nn.init.normal_(part.weight)
        nn.init.normal_(part.bias)
    return module


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_written_out(role: Role, kind: str, chunk: int) -> None:
    module, x = build(role), torch.randn(2, 7, DIM)
    expected = [by_hand(module, x[b], SEGMENTS[kind][b], x[b], SEGMENTS[kind][b]) for b in range(2)]
    assert_real_equal(module(x, sequence(kind)), torch.stack(expected), SEGMENTS[kind])


@pytest.mark.parametrize("kind", SEGMENTS)
@torch.no_grad()
def test_cross_written_out(kind: str) -> None:
    module, x, memory = build("cross"), torch.randn(2, 4, DIM), torch.randn(2, 7, DIM)
    rows = [[1, 0, 2, 3], [1, 2, 2, 0]] if kind == "packed" else [[1, 1, 0, 1], [2, 2, 2, 5]]
    actual = module(x, Sequence.from_segments(torch.tensor(rows)), memory=Memory(memory, sequence(kind)))
    assert torch.isfinite(actual).all()
    for row, segments in enumerate(rows):
        there = [s if s in SEGMENTS[kind][row] else 0 for s in segments]  # who has something to read
        expected = by_hand(module, x[row], there, memory[row], SEGMENTS[kind][row])
        real = torch.tensor(there) > 0
        torch.testing.assert_close(actual[row, real], expected[real])


class Identity(nn.Module):
    """Gives each position a value of its own, so that the mixed values are the mixing matrix."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.eye(x_BTD.shape[1]).expand(len(x_BTD), -1, -1)


@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_the_mixing_matrix(role: Role) -> None:
    """Its rows are weights, a bidirectional one has at most the rank of the slots, a causal one sees nothing ahead."""
    module = build(role, dim=12)
    module.value, module.out = Identity(), nn.Identity()  # type: ignore[assignment]
    (matrix,) = module(torch.randn(1, 12, 12), Sequence.dense(12))
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(12))
    if role == "bidirectional":
        assert torch.linalg.matrix_rank(matrix) == RANK
    else:
        assert not matrix.triu(1).any()
        assert (matrix.tril() > 0).sum() == 12 * 13 / 2


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("kind", SEGMENTS)
@torch.no_grad()
def test_pieces_equal_the_whole(kind: str, cuts: list[int], chunk: int) -> None:
    module, x, seq = build("causal"), torch.randn(2, 7, DIM), sequence(kind)
    pieces, state = decode(module, x, seq, cuts)
    assert_real_equal(pieces, module(x, seq), SEGMENTS[kind])
    assert shapes(state) == shapes(module.init_state(2, 7, x))


@torch.no_grad()
def test_ragged_prompts_then_tokens_and_beams(chunk: int) -> None:
    assert_ragged_prompts_then_tokens_and_beams(build("causal"))


@torch.no_grad()
def test_cross_state_keeps_the_memory() -> None:
    module = build("cross")
    assert_cross_state_keeps_the_memory(module)
    with pytest.raises(ValueError, match="memory"):
        module(torch.randn(2, 5, DIM), Sequence.dense(5))


@pytest.mark.parametrize("role", ROLES)
def test_gradcheck(role: Role, chunk: int) -> None:
    module, seq = build(role), sequence("packed")
    x, memory = torch.randn(2, 7, DIM, requires_grad=True), torch.randn(2, 7, DIM, requires_grad=True)

    def run(x: Tensor, memory: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = module(x, seq, memory=Memory(memory, seq) if role == "cross" else None)
        return y * (torch.tensor(SEGMENTS["packed"]) > 0)[..., None]

    assert torch.autograd.gradcheck(run, (x, memory, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("role", ROLES)
def test_bfloat16(role: Role, kind: str, chunk: int) -> None:
    module, seq, x = build(role), sequence(kind), torch.randn(2, 7, DIM)

    def run(x: Tensor) -> list[Tensor]:
        whole = module(x, seq, memory=Memory(x, seq) if role == "cross" else None)
        return [whole, decode(module, x, seq, [4, 1, 2])[0]] if role == "causal" else [whole]

    expected = run(x)[0]
    module, x = module.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    module, x = module.bfloat16(), x.bfloat16()
    real = torch.tensor(SEGMENTS[kind]) > 0
    for actual in found + run(x):
        assert actual.dtype is torch.bfloat16
        torch.testing.assert_close(actual[real].double(), expected[real], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_long_rows_in_float32(role: Role) -> None:
    """2048 columns of several documents with padding, in float32, against the written-out matrix in float64."""
    length = 2048
    module, x = build(role), torch.randn(1, length, DIM)
    segments = (torch.rand(1, length) < 0.002).cumsum(-1).add(1) * (torch.rand(1, length) < 0.9)
    seen = segments[0, :, None] == segments[0, None]
    if role == "causal":
        seen = seen & (torch.arange(length)[:, None] >= torch.arange(length))
    read, write = module.read(x[0]).softmax(-1), module.write(x[0]).sigmoid() + 1e-4
    mixing = sum(
        read[:, k, None] * (write[:, k] * seen) / (write[:, k] * seen).sum(-1, keepdim=True) for k in range(RANK)
    )
    expected, real = module.out(mixing @ module.value(x[0])), segments[0] > 0
    torch.testing.assert_close(module(x, Sequence.from_segments(segments))[0, real], expected[real])
    actual = module.float()(x.float(), Sequence.from_segments(segments))
    torch.testing.assert_close(actual[0, real].double(), expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_slots_that_nobody_writes_to(dtype: torch.dtype) -> None:
    """A gate that is shut everywhere gives the plain mean."""
    module, x = build("causal"), torch.randn(1, 7, DIM)
    nn.init.constant_(module.write.bias, -1000.0)
    mean = module.value(x).cumsum(1) / torch.arange(1, 8)[:, None]
    actual = module.to(dtype)(x.to(dtype), Sequence.dense(7))
    torch.testing.assert_close(actual.double(), module.double().out(mean), rtol=0.02, atol=0.01)


def measured(module: LowRank, length: int) -> float:
    """Return the FLOPs of the mixing a position, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        module.to("meta")(torch.randn(1, length, DIM, device="meta"), Sequence.dense(length, "meta"))
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return float(counter.get_total_flops()) / length - 2 * weights


def test_flops() -> None:
    """What is said is what is done, and it does not grow with the length."""
    both = build("bidirectional")
    assert both.mixing_flops(256) == measured(both, 256) == measured(both, 1024)
    causal = build("causal")
    pairs = 2 * 128 * (RANK + DIM) + 2 * 128 * (1 + RANK)
    assert causal.mixing_flops(256) + pairs / 2 == measured(causal, 256) == measured(causal, 1024)
    # Slots are written once for each position of the memory, and read once for each position.
    assert build("cross").mixing_flops(256) == 2 * 2 * RANK * DIM + 2 * 2 * RANK


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="rank must be at least 1, got 0"):
        LowRank(DIM, "causal", rank=0)
    assert build("bidirectional").init_state(1, 2, torch.zeros(1)) is None
