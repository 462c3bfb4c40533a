"""Linear attention and retention against plain loops: whole, in chunks, in pieces."""

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
    columns,
    decode,
    dot,
    sequence,
    shapes,
    turned,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence
from llmkit_plugins.attention import chunked
from llmkit_plugins.attention.linear import Linear, Retention
from llmkit_plugins.position import Rotary

DIM, HEADS = 8, 2
VARIANTS = [(Linear, role) for role in ("causal", "bidirectional")]
VARIANTS += [(Retention, role) for role in ("causal", "bidirectional")]  # type: ignore[misc]


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
    module: Linear | Retention,
    x_TD: Tensor,
    segments: list[int],
    memory_SD: Tensor | None = None,
    memory_segments: list[int] | None = None,
    rotary: bool = False,
) -> Tensor:
    """Return the outputs of one row, score by score; zeros at padding."""
    source_SD, source_segments = (x_TD, segments) if memory_SD is None else (memory_SD, memory_segments or [])
    retention, width = isinstance(module, Retention), DIM // HEADS

    def head(part: Any, vector: Tensor, h: int) -> list[float]:
        values: list[float] = (part.weight @ vector)[h * width : (h + 1) * width].tolist()
        if retention or part is module.v:
            return values
        return [value + 1 if value > 0 else math.exp(value) for value in values]

    rows = torch.zeros_like(x_TD)
    for i, segment in enumerate(segments):
        if not segment:
            continue
        seen = [j for j, other in enumerate(source_segments) if other == segment]
        places = {j: place for place, j in enumerate(seen)}
        if module.role == "causal":
            seen = [j for j in seen if j <= i]
        mixed: list[float] = []
        for h in range(HEADS):
            q, keys = head(module.q, x_TD[i], h), [head(module.k, source_SD[j], h) for j in seen]
            weights = [dot(q, key) for key in keys]
            scores = weights
            if rotary:
                q = turned(q, places[i])
                scores = [dot(q, turned(key, places[j])) for key, j in zip(keys, seen, strict=True)]
            if retention:
                fade = 1 - 2.0 ** (-5 - h)
                scores = [
                    s / math.sqrt(width) * fade ** abs(places[i] - places[j]) for s, j in zip(scores, seen, strict=True)
                ]
            values = [head(module.v, source_SD[j], h) for j in seen]
            summed = [dot(scores, [value[e] for value in values]) for e in range(width)]
            if retention:
                mean = sum(summed) / width
                spread = math.sqrt(sum((s - mean) ** 2 for s in summed) / width + 1e-6)
                mixed += [(s - mean) / spread for s in summed]
            else:
                mixed += [s / sum(weights) for s in summed]
        vector = torch.tensor(mixed)
        if isinstance(module, Retention):
            gate = module.gate.weight @ x_TD[i]
            vector = (vector * module.norm.weight + module.norm.bias) * gate / (1 + (-gate).exp())
        rows[i] = module.out.weight @ vector
    return rows


def build(variant: type[Linear] | type[Retention], role: Role) -> Linear | Retention:
    module = variant(DIM, role, num_heads=HEADS)
    if isinstance(module, Retention):
        torch.nn.init.uniform_(module.norm.weight, 0.5, 2.0)
        torch.nn.init.uniform_(module.norm.bias, -1.0, 1.0)
    return module


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize(("variant", "role"), VARIANTS)
@torch.no_grad()
def test_written_out(variant: Any, role: Role, kind: str, rotary: bool, chunk: int) -> None:
    module, x = build(variant, role), torch.randn(2, 7, DIM)
    expected = [by_hand(module, x[row], SEGMENTS[kind][row], rotary=rotary) for row in range(2)]
    assert_real_equal(
        module(x, sequence(kind, Rotary(DIM, 16) if rotary else None)), torch.stack(expected), SEGMENTS[kind]
    )


@pytest.mark.parametrize("kind", SEGMENTS)
@torch.no_grad()
def test_cross_written_out(kind: str) -> None:
    module, x, memory = build(Linear, "cross"), torch.randn(2, 4, DIM), torch.randn(2, 7, DIM)
    rows = [[1, 0, 2, 3], [1, 2, 2, 0]] if kind == "packed" else [[1, 1, 0, 1], [2, 2, 2, 5]]
    seq = Sequence.from_segments(torch.tensor(rows))
    actual = module(x, seq, memory=Memory(memory, sequence(kind)))
    assert torch.isfinite(actual).all()
    for row, segments in enumerate(rows):
        there = [s if s in SEGMENTS[kind][row] else 0 for s in segments]  # who has something to read
        expected = by_hand(module, x[row], there, memory[row], SEGMENTS[kind][row])
        real = torch.tensor(there) > 0
        torch.testing.assert_close(actual[row, real], expected[real])


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("variant", [Linear, Retention])
@torch.no_grad()
def test_pieces_equal_the_whole(variant: Any, kind: str, cuts: list[int], chunk: int) -> None:
    module, x, seq = build(variant, "causal"), torch.randn(2, 7, DIM), sequence(kind, Rotary(DIM, 16))
    pieces, state = decode(module, x, seq, cuts)
    assert_real_equal(pieces, module(x, seq), SEGMENTS[kind])
    assert shapes(state) == shapes(module.init_state(2, 7, x))


@pytest.mark.parametrize("variant", [Linear, Retention])
@torch.no_grad()
def test_ragged_prompts_then_tokens_and_beams(variant: Any, chunk: int) -> None:
    assert_ragged_prompts_then_tokens_and_beams(build(variant, "causal"), Rotary(DIM, 16))


@torch.no_grad()
def test_cross_state_keeps_the_memory() -> None:
    module = build(Linear, "cross")
    assert_cross_state_keeps_the_memory(module)
    with pytest.raises(ValueError, match="memory"):
        module(torch.randn(2, 5, DIM), Sequence.dense(5))


@pytest.mark.parametrize(("variant", "role"), [*VARIANTS, (Linear, "cross")])
def test_gradcheck(variant: Any, role: Role, chunk: int) -> None:
    module, seq = build(variant, role), sequence("packed", Rotary(DIM, 16))
    x, memory = torch.randn(2, 7, DIM, requires_grad=True), torch.randn(2, 7, DIM, requires_grad=True)

    def run(x: Tensor, memory: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = module(x, seq, memory=Memory(memory, seq) if role == "cross" else None)
        return y * (torch.tensor(SEGMENTS["packed"]) > 0)[..., None]

    assert torch.autograd.gradcheck(run, (x, memory, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize(("variant", "role"), [*VARIANTS, (Linear, "cross")])
def test_bfloat16(variant: Any, role: Role, kind: str, chunk: int) -> None:
    module, seq, x = build(variant, role), sequence(kind, Rotary(DIM, 16)), torch.randn(2, 7, DIM)

    def run(x: Tensor) -> Tensor:
        y: Tensor = module(x, columns(seq, 0, 7), memory=Memory(x, columns(seq, 0, 7)) if role == "cross" else None)
        return y

    expected = run(x)
    module, x = module.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(x)] + ([decode(module, x, seq, [4, 1, 2])[0]] if role == "causal" else [])
    module, x = module.bfloat16(), x.bfloat16()
    found += [run(x)] + ([decode(module, x, seq, [4, 1, 2])[0]] if role == "causal" else [])
    real = torch.tensor(SEGMENTS[kind]) > 0
    for actual in found:
        assert actual.dtype is torch.bfloat16
        torch.testing.assert_close(actual[real].double(), expected[real], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("variant", "role"), VARIANTS)
@torch.no_grad()
def test_long_rows_in_float32(variant: Any, role: Role) -> None:
    """2048 columns of several documents with padding, in float32, against all pairs in float64."""
    length = 2048
    module, x = build(variant, role), torch.randn(1, length, DIM)
    segments = (torch.rand(1, length) < 0.002).cumsum(-1).add(1) * (torch.rand(1, length) < 0.9)
    seq = Sequence.from_segments(segments)
    q, k, v = (part(x[0]).view(length, HEADS, -1).transpose(0, 1) for part in (module.q, module.k, module.v))
    seen = segments[0, :, None] == segments[0, None]
    if role == "causal":
        seen = seen & (torch.arange(length)[:, None] >= torch.arange(length))
    if isinstance(module, Retention):
        fade = 1 - 2.0 ** (-5 - torch.arange(HEADS))[:, None, None]
        places = seq.positions_BT[0].double()
        scores = q @ k.mT / 2 * seen * fade ** (places[:, None] - places).abs()
        mixed = torch.nn.functional.layer_norm(scores @ v, (DIM // HEADS,), eps=1e-6).transpose(0, 1).flatten(1)
        mixed = (mixed * module.norm.weight + module.norm.bias) * torch.nn.functional.silu(module.gate(x[0]))
    else:
        scores = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT * seen
        mixed = (scores @ v / scores.sum(-1, keepdim=True)).transpose(0, 1).flatten(1)
    expected = module.out(mixed)
    real = segments[0] > 0
    torch.testing.assert_close(module(x, seq)[0, real], expected[real])
    actual = module.float()(x.float(), Sequence.from_segments(segments))
    torch.testing.assert_close(actual[0, real].double(), expected[real], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_features_of_negative_numbers() -> None:
    """What is left of elu(x) + 1 at -11 is 2e-5: the one must not be added and taken away in float32."""
    module, x = build(Linear, "causal"), 1 + 0.1 * torch.randn(1, 7, DIM)
    for part in (module.q, module.k):
        torch.nn.init.constant_(part.weight, -11 / DIM)
    expected = by_hand(module, x[0], [1] * 7)
    actual = module.float()(x.float(), Sequence.dense(7))[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def measured(module: Linear | Retention, length: int) -> float:
    """Return the FLOPs of the mixing a position, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        module.to("meta")(torch.randn(1, length, DIM, device="meta"), Sequence.dense(length, "meta"))
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return float(counter.get_total_flops()) / length - 2 * weights


@pytest.mark.parametrize(("variant", "values"), [(Linear, DIM + HEADS), (Retention, DIM)])
def test_flops(variant: Any, values: int) -> None:
    """What is said is what is done, and it does not grow with the length."""
    both, causal = build(variant, "bidirectional"), build(variant, "causal")
    assert both.mixing_flops(256) == measured(both, 256) == measured(both, 1024)
    # Both halves of the pairs of a chunk are computed; as for any causal variant, the half that is used counts.
    pairs = 2 * 128 * (DIM + values + (DIM if variant is Linear else 0))
    assert causal.mixing_flops(256) + pairs / 2 == measured(causal, 256) == measured(causal, 1024)


def test_flops_of_cross() -> None:
    """Keys times values and ones are summed once for each position of the memory, and read once for each position."""
    assert build(Linear, "cross").mixing_flops(256) == 2 * 2 * DIM * (DIM / HEADS + 1)


@pytest.mark.parametrize("variant", [Linear, Retention])
def test_what_is_refused(variant: Any) -> None:
    with pytest.raises(UserError, match="dim 8 is not divisible by num_heads 3"):
        variant(8, "causal", num_heads=3)
    assert build(variant, "bidirectional").init_state(1, 2, torch.zeros(1)) is None
