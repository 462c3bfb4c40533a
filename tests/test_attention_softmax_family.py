"""Sliding windows, differential and latent attention against plain loops, whole and in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_pieces import columns, decode, dot, turned
from torch import Tensor, nn

from llmkit.contracts import Position, Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence
from llmkit_plugins.attention.differential import Differential
from llmkit_plugins.attention.latent import Latent
from llmkit_plugins.attention.softmax import GroupedQuery, MultiHead
from llmkit_plugins.attention.window import SlidingWindow
from llmkit_plugins.position import Alibi, Rotary

DIM = 16
Variant = GroupedQuery | Latent
VARIANTS: dict[str, tuple[type[Variant], dict[str, Any]]] = {
    "window_1": (SlidingWindow, {"window": 1}),
    "window_2": (SlidingWindow, {"window": 2, "num_kv_heads": 2}),
    "window_3": (SlidingWindow, {"window": 3, "num_heads": 2}),
    "window_64": (SlidingWindow, {}),
    "differential": (Differential, {}),
    "differential_2": (Differential, {"num_heads": 2, "lambda_init": 0.3}),
    "latent": (Latent, {}),
    "latent_narrow": (Latent, {"num_heads": 2, "kv_rank": 3, "rope_dim": 4}),
}
CROSS = [name for name in VARIANTS if "window" not in name]


class Uneven(Position):
    """A bias by which positions matter themselves, not only their distance; it does not take other ones."""

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor:
        assert all(place.min() >= 0 and place.max() < self.max_length for place in (query_BT, key_BS))
        apart_B1TS = torch.sin(query_BT[:, None, :, None] * 3 + key_BS[:, None, None, :] * 0.7)
        return apart_B1TS * torch.arange(1, num_heads + 1)[:, None, None]


POSITIONS: dict[str, type[Position] | None] = {"none": None, "rotary": Rotary, "alibi": Alibi}
SEGMENTS: dict[str, list[list[int]] | None] = {
    "dense": None,
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "middle": [[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0]],
    "packed": [[1, 1, 1, 1, 2, 2, 0], [0, 1, 0, 2, 0, 2, 3]],
    "empty_row": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 2]],
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name: str, role: Role = "causal", **kwargs: Any) -> Variant:
    """Build a variant whose scales are not all ones."""
    variant, args = VARIANTS[name]
    module = variant(DIM, role, **{**args, **kwargs})
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.endswith("scale"):
            nn.init.uniform_(parameter, 0.5, 2.0)
    return module.eval()


def sequence(kind: str, position: str = "none", length: int = 7) -> Sequence:
    rows = SEGMENTS[kind]
    seq = Sequence.dense(length) if rows is None else Sequence.from_segments(torch.tensor(rows))
    encoding = POSITIONS[position]
    seq.position = encoding(DIM, 64) if encoding else None
    return seq


def take(seq: Sequence, rows: Tensor) -> Sequence:
    if seq.segments_BT is None:
        return Sequence(seq.positions_BT, None, seq.position)
    return Sequence(seq.positions_BT[rows], seq.segments_BT[rows], seq.position)


def real(seq: Sequence, batch: int = 2) -> Tensor:
    length = seq.positions_BT.shape[1]
    return torch.ones(batch, length, dtype=torch.bool) if seq.segments_BT is None else seq.segments_BT > 0


def assert_real_equal(actual: Tensor, expected: Tensor, seq: Sequence) -> None:
    assert torch.isfinite(actual).all()
    rows = real(seq, len(actual))
    torch.testing.assert_close(actual[rows], expected[rows], rtol=1e-6, atol=1e-7)


# --- What the papers say, number by number. -------------------------------------------------------------------------


def normed(vector: list[float], scale: list[float]) -> list[float]:
    size = math.sqrt(sum(value * value for value in vector) / len(vector) + 1e-6)
    return [value / size * factor for value, factor in zip(vector, scale, strict=True)]


def weighted(scores: list[float], values: list[list[float]]) -> list[float]:
    shares = [math.exp(score) for score in scores]
    total = sum(shares)
    return [sum(s / total * value[e] for s, value in zip(shares, values, strict=True)) for e in range(len(values[0]))]


def rows_of(weight: Tensor, vector: Tensor, number: int, width: int) -> list[float]:
    result: list[float] = (weight[number * width : (number + 1) * width] @ vector).tolist()
    return result


class ByHand:
    """One head's output at one position from what that position sees."""

    def __init__(self, module: Variant, position: str) -> None:
        self.module = module
        self.cross = module.role == "cross"
        self.position = "none" if self.cross else position

    def turn(self, vector: list[float], place: int) -> list[float]:
        return turned(vector, place) if self.position == "rotary" else vector

    def penalty(self, head: int, heads: int, place: int, other: int) -> float:
        return 2.0 ** (-8 * (head + 1) / heads) * abs(place - other) if self.position == "alibi" else 0.0

    def output(self, x: Tensor, place: int, seen: list[tuple[Tensor, int]]) -> Tensor:
        m = self.module
        if isinstance(m, Differential):
            mixed = [v for h in range(m.num_heads // 2) for v in self.differential(m, h, x, place, seen)]
        elif isinstance(m, Latent):
            mixed = [v for h in range(m.num_heads) for v in self.latent(m, h, x, place, seen)]
        else:
            assert isinstance(m, SlidingWindow)
            mixed = [v for h in range(m.num_heads) for v in self.window(m, h, x, place, seen)]
        return m.out.weight @ torch.tensor(mixed)

    def weights(self, m: GroupedQuery) -> tuple[Tensor, Tensor, Tensor]:
        if self.cross:
            wk, wv = m.kv.weight.chunk(2)
            return m.q.weight, wk, wv
        kv_dim = m.num_kv_heads * m.head_dim
        wq, wk, wv = torch.split(m.qkv.weight, [DIM, kv_dim, kv_dim])
        return wq, wk, wv

    def turned_head(self, m: GroupedQuery, weight: Tensor, x: Tensor, number: int, place: int) -> list[float]:
        vector = rows_of(weight, x, number, m.head_dim)
        return self.turn(vector if m.qk_scale is None else normed(vector, m.qk_scale.tolist()), place)

    def window(self, m: SlidingWindow, h: int, x: Tensor, place: int, seen: list[tuple[Tensor, int]]) -> list[float]:
        wq, wk, wv = self.weights(m)
        shared = h // (m.num_heads // m.num_kv_heads)
        q = self.turned_head(m, wq, x, h, place)
        scores = [
            dot(q, self.turned_head(m, wk, y, shared, other)) / math.sqrt(m.head_dim)
            - self.penalty(h, m.num_heads, place, other)
            for y, other in seen
        ]
        return weighted(scores, [rows_of(wv, y, shared, m.head_dim) for y, _ in seen])

    def differential(
        self, m: Differential, h: int, x: Tensor, place: int, seen: list[tuple[Tensor, int]]
    ) -> list[float]:
        wq, wk, wv = self.weights(m)
        heads, E = m.num_heads // 2, DIM // m.num_heads
        sums = []
        for number in (h, heads + h):
            q = self.turned_head(m, wq, x, number, place)
            scores = [
                dot(q, self.turned_head(m, wk, y, number, other)) / math.sqrt(E) - self.penalty(h, heads, place, other)
                for y, other in seen
            ]
            sums.append(weighted(scores, [rows_of(wv, y, h, 2 * E) for y, _ in seen]))
        first = math.exp(dot(m.lambda_q1.tolist(), m.lambda_k1.tolist()))
        second = math.exp(dot(m.lambda_q2.tolist(), m.lambda_k2.tolist()))
        share = first - second + m.lambda_init
        left = [a - share * b for a, b in zip(*sums, strict=True)]
        return [(1 - m.lambda_init) * value for value in normed(left, m.head_scale.tolist())]

    def latent(self, m: Latent, h: int, x: Tensor, place: int, seen: list[tuple[Tensor, int]]) -> list[float]:
        E, R = DIM // m.num_heads, m.kv_rank
        P = 0 if self.cross else m.rope_dim
        q = rows_of(m.q.weight, x, h, E + P)
        q = q[:E] + self.turn(q[E:], place)
        scores, values = [], []
        for y, other in seen:
            down = (m.down.weight @ y).tolist()
            assert len(down) == R + P
            latent = torch.tensor(normed(down[:R], m.latent_scale.tolist()))
            k = rows_of(m.up.weight[:DIM], latent, h, E) + self.turn(down[R:], other)
            scores.append(dot(q, k) / math.sqrt(E + P) - self.penalty(h, m.num_heads, place, other))
            values.append(rows_of(m.up.weight[DIM:], latent, h, E))
        return weighted(scores, values)


def written_out(module: Variant, x: Tensor, seq: Sequence, mem: Tensor, mem_seq: Sequence, position: str) -> Tensor:
    """The output at every real position, from what it may see."""
    by_hand, out = ByHand(module, position), torch.zeros_like(x)
    window = module.window if isinstance(module, SlidingWindow) else 10**9

    def numbers(of: Sequence, row: int) -> list[int]:
        return [1] * of.positions_BT.shape[1] if of.segments_BT is None else of.segments_BT[row].tolist()

    for b in range(len(x)):
        own, others = numbers(seq, b), numbers(mem_seq, b)
        # The place of a position in its document, counted here and not taken from the sequence.
        place = [own[:i].count(n) for i, n in enumerate(own)]
        other_place = [others[:j].count(n) for j, n in enumerate(others)]
        for i, number in enumerate(own):
            if number == 0:
                continue
            seen = [j for j, other in enumerate(others) if other == number]
            if module.role == "causal":
                seen = [j for j in seen if j <= i][-window:]
            elif module.role == "bidirectional":
                middle = seen.index(i)
                seen = seen[max(0, middle - window + 1) : middle + window]
            out[b, i] = by_hand.output(x[b, i], place[i], [(mem[b, j], other_place[j]) for j in seen])
    return out


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_written_out(name: str, role: Role, position: str) -> None:
    module, x = build(name, role), torch.randn(2, 7, DIM)
    for kind in ("dense", "middle", "packed"):
        seq = sequence(kind, position)
        assert_real_equal(module(x, seq), written_out(module, x, seq, x, seq, position), seq)


@pytest.mark.parametrize("name", ["window_2", "differential"])
@torch.no_grad()
def test_written_out_without_qk_norm(name: str) -> None:
    module, seq, x = build(name, qk_norm=False), sequence("packed", "rotary"), torch.randn(2, 7, DIM)
    assert_real_equal(module(x, seq), written_out(module, x, seq, x, seq, "rotary"), seq)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CROSS)
@torch.no_grad()
def test_cross_written_out(name: str, position: str) -> None:
    module, seq = build(name, "cross"), sequence("dense", position, 4)
    x, memory = torch.randn(2, 4, DIM), torch.randn(2, 7, DIM)
    for kind in ("dense", "right", "middle"):
        memory_seq = sequence(kind, position)
        actual = module(x, seq, memory=Memory(memory, memory_seq))
        assert_real_equal(actual, written_out(module, x, seq, memory, memory_seq, position), seq)


# --- What every variant owes the network. -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
def test_sees_what_it_may(name: str, role: Role, kind: str) -> None:
    """By gradient: exactly the positions of the document that are near enough and not ahead."""
    module, seq = build(name, role), sequence(kind, "rotary")
    window = module.window if isinstance(module, SlidingWindow) else 7
    x = torch.randn(2, 7, DIM, requires_grad=True)
    y = module(x, seq)
    for b in range(2):
        own = [1] * 7 if seq.segments_BT is None else seq.segments_BT[b].tolist()
        for i in range(7):
            if own[i] == 0:
                continue
            document = [j for j in range(7) if own[j] == own[i]]
            at = document.index(i)
            seen = document[max(0, at - window + 1) : at + (1 if role == "causal" else window)]
            (grad,) = torch.autograd.grad(y[b, i].square().sum(), x, retain_graph=True)
            assert grad[b].any(-1).nonzero().flatten().tolist() == seen and not grad[1 - b].any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_decoding_equals_full(name: str, kind: str, position: str) -> None:
    module, seq, x = build(name), sequence(kind, position), torch.randn(2, 7, DIM)
    expected = module(x, seq)
    for cuts in ([1] * 7, [3, 1, 2, 1], [2, 5]):
        assert_real_equal(decode(module, x, seq, cuts)[0], expected, seq)


@pytest.mark.parametrize("prompt", [[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [0, 1, 1, 1]], None])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_ragged_prompt_then_tokens(name: str, prompt: list[list[int]] | None) -> None:
    """New tokens come without segments; later one row is over and gets padding."""
    module, x = build(name), torch.randn(2, 9, DIM)
    for position in POSITIONS:
        assert_ragged_decoding(module, x, position, prompt)


def assert_ragged_decoding(module: Variant, x: Tensor, position: str, prompt: list[list[int]] | None) -> None:
    later = [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    first = torch.ones(2, 4, dtype=torch.long) if prompt is None else torch.tensor(prompt)
    full = Sequence.from_segments(torch.cat([first, torch.tensor(later)], 1))
    full.position = sequence("dense", position).position
    state, parts = module.init_state(2, 9, x), []
    assert state is not None
    for start, end in [(0, 4), (4, 5), (5, 7), (7, 8), (8, 9)]:
        part = columns(full, start, end)
        if (start == 0 and prompt is None) or start in (4, 5, 8):
            part.segments_BT = None
        parts.append(module(x[:, start:end], part, state=state))
    assert_real_equal(torch.cat(parts, 1), module(x, full), full)


@pytest.mark.parametrize("kind", ["dense", "middle", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_reorder(name: str, kind: str) -> None:
    module, seq, x = build(name), sequence(kind, "alibi"), torch.randn(2, 7, DIM)
    rows = torch.tensor([1, 1, 0])
    state = module.init_state(2, 7, x)
    assert state is not None
    module(x[:, :5], columns(seq, 0, 5), state=state)
    state.reorder(rows)
    full = take(seq, rows)
    expected = module(x[rows], full)
    actual = module(x[rows, 5:], columns(full, 5, 7), state=state)
    assert_real_equal(torch.cat([expected[:, :5], actual], 1), expected, full)


@pytest.mark.parametrize("kind", ["dense", "middle"])
@pytest.mark.parametrize("name", CROSS)
@torch.no_grad()
def test_cross_decoding_keeps_the_memory(name: str, kind: str) -> None:
    module, seq = build(name, "cross"), sequence("dense")
    x, memory = torch.randn(2, 7, DIM), Memory(torch.randn(2, 7, DIM), sequence(kind))
    expected = module(x, seq, memory=memory)
    torch.testing.assert_close(decode(module, x, seq, [3, 1, 3], memory=memory)[0], expected)

    state, rows = module.init_state(2, 7, x), torch.tensor([1, 0, 1])
    assert state is not None
    module(x[:, :2], columns(seq, 0, 2), memory=memory, state=state)
    state.reorder(rows)
    other = Memory(torch.randn(2, 7, DIM), sequence("dense"))
    torch.testing.assert_close(module(x[rows, 2:], columns(seq, 2, 7), memory=other, state=state), expected[rows, 2:])
    masked = Sequence(columns(seq, 2, 7).positions_BT, torch.ones(3, 5, dtype=torch.long))
    torch.testing.assert_close(module(x[rows, 2:], masked, state=state), expected[rows, 2:])


@pytest.mark.parametrize(("kind", "position"), [("dense", "none"), ("middle", "rotary"), ("right", "alibi")])
@pytest.mark.parametrize("role", ["causal", "bidirectional", "cross"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name: str, role: Role, kind: str, position: str) -> None:
    if role not in VARIANTS[name][0].roles:
        return
    module, key_seq = build(name, role), sequence(kind, position)
    x, memory = torch.randn(2, 7, DIM, requires_grad=True), torch.randn(2, 7, DIM, requires_grad=True)
    seq = sequence("dense", position) if role == "cross" else key_seq
    mask = real(seq)[..., None]

    def run(x: Tensor, memory: Tensor, *_: Tensor) -> Tensor:
        given = Memory(memory, key_seq) if role == "cross" else None
        return torch.where(mask, module(x, seq, memory=given), 0.0)

    assert torch.autograd.gradcheck(run, (x, memory, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize(("kind", "position"), [("dense", "rotary"), ("packed", "alibi"), ("packed", "none")])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_bfloat16(name: str, position: str, kind: str) -> None:
    module, seq, x = build(name), sequence(kind, position), torch.randn(2, 7, DIM)
    expected, rows = module(x, seq), real(seq)
    module, x = module.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        results = [module(x, columns(seq, 0, 7)), decode(module, x, seq, [4, 1, 2])[0]]
    module, x = module.bfloat16(), x.bfloat16()
    half = [module(x, columns(seq, 0, 7)), decode(module, x, seq, [4, 1, 2])[0]]
    assert all(y.dtype is torch.bfloat16 for y in half)
    # Where the two maps nearly cancel, what is left is normalised with its rounding errors.
    allowed = 0.2 if "differential" in name else 0.05
    for actual in results + half:
        torch.testing.assert_close(actual[rows].double(), expected[rows], rtol=0.1, atol=allowed)


@pytest.mark.parametrize("role", ["causal", "bidirectional", "cross"])
@pytest.mark.parametrize("name", VARIANTS)
def test_meta_device(name: str, role: Role) -> None:
    """Shapes are enough to build it and to run it, whole and in pieces."""
    variant, args = VARIANTS[name]
    if role not in variant.roles:
        return
    with torch.device("meta"):
        module, x = variant(DIM, role, **args), torch.randn(2, 12, DIM)
        memory = Memory(x, Sequence.dense(12, "meta")) if role == "cross" else None
        assert module(x, Sequence.dense(12, "meta"), memory=memory).shape == x.shape
        if role != "bidirectional":
            assert decode(module, x, Sequence.dense(12, "meta"), [9, 1, 2], memory=memory)[0].shape == x.shape


@pytest.mark.parametrize("name", ["window_2", "differential", "latent"])
@torch.no_grad()
def test_compiles_as_one_graph(name: str) -> None:
    module, x = build(name), torch.randn(2, 7, DIM)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, sequence("dense", "rotary")), module(x, sequence("dense", "rotary")))


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_only_in_training(name: str) -> None:
    module, x, seq = build(name, dropout=0.5), torch.randn(2, 7, DIM), sequence("dense")
    expected = module(x, seq)
    assert torch.equal(module(x, seq), expected) and not torch.allclose(module.train()(x, seq), expected)


@pytest.mark.parametrize(
    ("variant", "dim", "args", "message"),
    [
        (SlidingWindow, 16, {"window": 0}, "window must be at least 1 (the position itself), got 0"),
        (SlidingWindow, 18, {}, "dim 18 is not divisible by num_heads 4; nearest widths: 16, 20"),
        (SlidingWindow, 16, {"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3; allowed: 1, 2, 4"),
        (
            Differential,
            20,
            {},
            "dim 20 is not divisible by twice num_heads 4 (two maps a head); nearest widths: 16, 24",
        ),
        (Differential, 16, {"num_heads": 0}, "num_heads and num_kv_heads must be at least 1, got 0 and 0"),
        (Differential, 16, {"lambda_init": 1.0}, "lambda_init must be at least 0 and below 1, got 1.0"),
        (Latent, 18, {}, "dim 18 is not divisible by num_heads 4; nearest widths: 16, 20"),
        (Latent, 16, {"kv_rank": 0}, "kv_rank must be at least 1, got 0"),
        (Latent, 16, {"rope_dim": 3}, "rope_dim must be even and at least 2, got 3"),
        (Latent, 16, {"dropout": 1.0}, "attention dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_arguments(variant: type[Variant], dim: int, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        variant(dim, "causal", **args)
    assert str(error.value) == message


# --- The sliding window. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, Rotary, Alibi, Uneven])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
def test_blocks_equal_the_mask(role: Role, window: int, position: type[Position] | None) -> None:
    """Segments of ones say what no segments say, but are computed under a mask."""
    module = SlidingWindow(DIM, role, window=window, num_kv_heads=2)
    x, weights = torch.randn(2, 37, DIM, requires_grad=True), torch.randn(2, 37, DIM)
    dense, masked = Sequence.dense(37), Sequence.from_segments(torch.ones(2, 37, dtype=torch.long))
    dense.position = masked.position = position(DIM, 37) if position else None
    outputs = [module(x, seq) for seq in (dense, masked)]
    grads = [torch.autograd.grad((y * weights).sum(), [x, *module.parameters()]) for y in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert any("blocks" in key[0] for key in dense.memo) and not any("blocks" in key[0] for key in masked.memo)


@pytest.mark.parametrize(("role", "width"), [("causal", 16), ("bidirectional", 24)])
def test_cost_grows_with_the_length(monkeypatch: pytest.MonkeyPatch, role: Role, width: int) -> None:
    scores: list[int] = []
    plain = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        assert kwargs["attn_mask"].numel() == q.shape[0] * q.shape[2] * k.shape[2]
        return plain(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    module = SlidingWindow(DIM, role, window=8)
    for length in (64, 640):
        module(torch.randn(2, length, DIM), Sequence.dense(length))
    assert scores == [2 * 4 * length * width for length in (64, 640)]


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_wide_window_is_multi_head(role: Role, kind: str) -> None:
    module, full = SlidingWindow(DIM, role, window=7), MultiHead(DIM, role)
    full.load_state_dict(module.state_dict())
    x, seq = torch.randn(2, 7, DIM), sequence(kind, "alibi")
    torch.testing.assert_close(module(x, seq), full(x, seq))
    assert module.mixing_flops(7) == full.mixing_flops(7)


def test_layers_of_other_windows_do_not_share_masks() -> None:
    x, seq = torch.randn(2, 7, DIM), sequence("packed", "alibi")
    dense = sequence("dense", "alibi")
    for name in ("window_2", "window_64", "window_3", "window_1"):
        module = build(name)
        torch.testing.assert_close(module(x, seq), module(x, sequence("packed", "alibi")))
        torch.testing.assert_close(module(x, dense), module(x, sequence("dense", "alibi")))


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@torch.no_grad()
def test_window_cache_with_much_padding(position: str) -> None:
    """The cache has one size for ever, and padding takes no room in it."""
    module = SlidingWindow(DIM, "causal", window=4)
    documents = (torch.rand(5, 60) < 0.05).long().cumsum(-1) + 1
    seq = Sequence.from_segments(documents * (torch.rand(5, 60) < 0.5))
    seq.position = sequence("dense", position).position
    x = torch.randn(5, 60, DIM)
    expected = module(x, seq)
    state, short = module.init_state(5, 6, x), module.init_state(5, 3, x)
    assert state is not None and short is not None
    with pytest.raises(ValueError, match="room for 3 columns, got 9"):
        module(x[:, :9], columns(seq, 0, 9), state=short)
    sizes = {name: value.shape for name, value in state.items()}
    assert sizes["k"] == sizes["v"] == (5, 4, 4, 4)
    parts, start = [], 0
    for size in [9, *[1] * 20, 3, 17, 11]:
        parts.append(module(x[:, start : start + size], columns(seq, start, start + size), state=state))
        start += size
        assert sizes == {name: value.shape for name, value in state.items()} and state.length == start
    assert_real_equal(torch.cat(parts, 1), expected, seq)


def test_window_flops() -> None:
    """Scores and sums, 4 dim for each position that is seen, on average over the row."""
    for role, length, window in (("causal", 100, 8), ("bidirectional", 100, 8), ("causal", 5, 8)):
        seen = [
            sum(1 for j in range(length) if abs(i - j) < window and (role == "bidirectional" or j <= i))
            for i in range(length)
        ]
        flops = SlidingWindow(DIM, role, window=window).mixing_flops(length)  # type: ignore[arg-type]
        # Less than one position apart: like the other variants, half of a causal row leaves the diagonal out.
        assert abs(flops / (4 * DIM) - sum(seen) / length) < 1
    assert "cross" not in SlidingWindow.roles


# --- Differential attention. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["differential", "latent"])
def test_no_kernel_holds_all_scores(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a CPU those that do not need queries, keys and values of one width."""
    widths: list[set[int]] = []
    plain = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        widths.append({q.shape[-1], k.shape[-1], v.shape[-1]})
        return plain(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    variant, args = VARIANTS[name]
    variant(DIM, "causal", **args)(torch.randn(2, 7, DIM), Sequence.dense(7))
    assert widths and all(len(found) == 1 for found in widths)


def test_differential_sizes() -> None:
    module = Differential(DIM, "causal", num_heads=2)
    # Four vectors of E = 4 for lambda, a scale for queries and keys, one of 2 E for what a head returns.
    assert sum(p.numel() for p in module.parameters()) == 4 * DIM * DIM + 4 * 4 + 4 + 8
    state = module.init_state(3, 5, torch.zeros(1))
    assert state is not None and sum(value.numel() for value in state.values()) == 3 * 5 * 2 * DIM
    # Two maps of 2 heads over 4 channels, two sums of 2 heads over 8 channels, 10 positions, half of them seen.
    assert module.mixing_flops(10) == 2 * (2 * 2 * 4 + 2 * 2 * 8) * 10 / 2
    assert build("differential", "bidirectional").mixing_flops(10) == 6 * 10 * DIM


# --- Latent attention. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("role", ["causal", "cross"])
@pytest.mark.parametrize("name", ["latent", "latent_narrow"])
def test_absorbed_equals_expanded(monkeypatch: pytest.MonkeyPatch, name: str, role: Role, position: str) -> None:
    module, seq = build(name, role), sequence("packed", position)
    x = torch.randn(2, 7, DIM, requires_grad=True)
    memory = Memory(x, sequence("dense")) if role == "cross" else None
    weights, rows = torch.randn(2, 7, DIM), real(seq)[..., None]
    results = []
    for form in (Latent._absorbed, Latent._expanded):
        monkeypatch.setattr(Latent, "_absorbed", form)
        monkeypatch.setattr(Latent, "_expanded", form)
        y = torch.where(rows, module(x, seq, memory=memory), 0.0)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])])
    torch.testing.assert_close(results[0], results[1])


def test_latent_takes_the_cheaper_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for form in ("_absorbed", "_expanded"):
        plain = getattr(Latent, form)

        def record(self: Latent, *args: Any, form: str = form, plain: Any = plain) -> Tensor:
            taken.append(form)
            result: Tensor = plain(self, *args)
            return result

        monkeypatch.setattr(Latent, form, record)
    module, x = build("latent"), torch.randn(2, 40, DIM)
    module(x, Sequence.dense(40))
    decode(module, x, Sequence.dense(40), [20, 1, 1, 18])
    assert taken == ["_expanded", "_expanded", "_absorbed", "_absorbed", "_expanded"]


def test_latent_state_is_narrow() -> None:
    x = torch.randn(2, 7, DIM)
    state = Latent(DIM, "causal", kv_rank=5, rope_dim=4).init_state(2, 9, x)
    assert state is not None and sum(value.numel() for value in state.values()) == 2 * 9 * (5 + 4)
    cross = Latent(DIM, "cross", kv_rank=5, rope_dim=4)
    state = cross.init_state(2, 9, x)
    assert state is not None
    cross(x[:, :1], Sequence.dense(1), memory=Memory(x, Sequence.dense(7)), state=state)
    assert sum(value.numel() for value in state.values()) == 2 * 7 * 5


@pytest.mark.parametrize("dim", [16, 20, 36, 64, 192])
def test_latent_defaults(dim: int) -> None:
    """They fit any width that the heads divide, and cost about what the usual attention does."""
    module, usual = Latent(dim, "causal"), MultiHead(dim, "causal")
    seq = Sequence.dense(3)
    seq.position = Rotary(dim, 8)
    assert module(torch.randn(1, 3, dim), seq).shape == (1, 3, dim)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (module, usual)]
    assert 0.95 < sizes[0] / sizes[1] < 1.2
    assert build("latent_narrow", "bidirectional").mixing_flops(10) == 2 * 10 * 2 * (8 + 4 + 8)
