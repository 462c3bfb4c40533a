"""Attention variants against plain code and torch.nn. What every variant owes is examined in test_kit_attention.py."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_pieces import columns, decode, turned
from torch import Tensor, nn

from llmkit.contracts import Attention, Position, Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence
from llmkit_plugins.attention import recurrent, softmax
from llmkit_plugins.attention.recurrent import GRU, LSTM, Recurrent
from llmkit_plugins.attention.softmax import GroupedQuery, MultiHead, Standard
from llmkit_plugins.position import Alibi, Rotary

DIM = 8
SOFTMAX: dict[str, tuple[type[GroupedQuery], dict[str, Any]]] = {
    "standard": (Standard, {}),
    "multi_head": (MultiHead, {"num_heads": 4}),
    "grouped_query": (GroupedQuery, {"num_heads": 4, "num_kv_heads": 2}),
    "multi_query": (GroupedQuery, {"num_heads": 4, "num_kv_heads": 1}),
}
ALL: dict[str, tuple[type[Attention], dict[str, Any]]] = {**SOFTMAX, "lstm": (LSTM, {}), "gru": (GRU, {})}
POSITIONS: dict[str, type[Position] | None] = {"none": None, "rotary": Rotary, "alibi": Alibi}
SEGMENTS: dict[str, list[list[int]] | None] = {
    "dense": None,
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "middle": [[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0]],
    "packed": [[1, 1, 1, 2, 2, 3, 0], [0, 1, 0, 2, 0, 2, 3]],
    "empty_row": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 2]],
}
CUTS = [[1] * 7, [3, 1, 2, 1]]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name: str, role: Role = "causal", **kwargs: Any) -> Attention:
    """Build a variant whose scale of queries and keys is not all ones."""
    variant, args = ALL[name]
    module = variant(DIM, role, **args, **kwargs)
    for scale in (getattr(module, name, None) for name in ("qk_scale", "k_scale")):
        if scale is not None:
            nn.init.uniform_(scale, 0.5, 2.0)
    return module.eval()


def sequence(kind: str, position: str = "none", length: int = 7) -> Sequence:
    rows = SEGMENTS[kind]
    encoding = POSITIONS[position]
    seq = Sequence.dense(length) if rows is None else Sequence.from_segments(torch.tensor(rows))
    seq.position = encoding(DIM, 16) if encoding else None
    return seq


def documents(seq: Sequence, batch: int = 2) -> list[tuple[int, list[int]]]:
    """Return (row, columns) of each document, found by plain looping."""
    found = []
    for row in range(batch):
        numbers = [1] * seq.positions_BT.shape[1] if seq.segments_BT is None else seq.segments_BT[row].tolist()
        for number in sorted(set(numbers) - {0}):
            found.append((row, [i for i, n in enumerate(numbers) if n == number]))
    return found


def assert_real_equal(actual: Tensor, expected: Tensor, seq: Sequence) -> None:
    for row, own in documents(seq, len(actual)):
        torch.testing.assert_close(actual[row, own], expected[row, own], rtol=1e-6, atol=1e-7)


def written_out(m: GroupedQuery, x: Tensor, seq: Sequence, mem: Tensor, mem_seq: Sequence, position: str) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V, number by number."""
    H, K, E = m.num_heads, m.num_kv_heads, m.head_dim
    cross = m.role == "cross"
    if cross:
        wq, (wk, wv) = m.q.weight, m.kv.weight.chunk(2)
    else:
        wq, wk, wv = torch.split(m.qkv.weight, [H * E, K * E, K * E])
    out = torch.zeros_like(x)
    query_segments = torch.ones(x.shape[:2]) if seq.segments_BT is None else seq.segments_BT
    key_segments = torch.ones(mem.shape[:2]) if mem_seq.segments_BT is None else mem_seq.segments_BT

    def head(weight: Tensor, vector: Tensor, number: int, place: int, is_value: bool = False) -> list[float]:
        scales = m.k_scale if weight is wk and m.k_scale is not None else m.qk_scale
        values = [float(weight[number * E + e] @ vector) for e in range(E)]
        if is_value:
            return values
        if scales is not None:
            size = math.sqrt(sum(value * value for value in values) / E + 1e-6)
            values = [value / size * float(scale) for value, scale in zip(values, scales, strict=True)]
        return turned(values, place) if position == "rotary" and not cross else values

    for b in range(x.shape[0]):
        at = seq.positions_BT[b if len(seq.positions_BT) > 1 else 0].tolist()
        key_at = mem_seq.positions_BT[b if len(mem_seq.positions_BT) > 1 else 0].tolist()
        for i in range(x.shape[1]):
            if query_segments[b, i] == 0:
                continue
            mixed: list[float] = []
            seen = [j for j in range(mem.shape[1]) if key_segments[b, j] == query_segments[b, i]]
            if m.role == "causal":
                seen = [j for j in seen if j <= i]
            for h in range(H):
                q = head(wq, x[b, i], h, at[i])
                scores, values = [], []
                for j in seen:
                    k = head(wk, mem[b, j], h // (H // K), key_at[j])
                    score = sum(a * c for a, c in zip(q, k, strict=True)) / math.sqrt(E)
                    if position == "alibi" and not cross:
                        score -= 2.0 ** (-8 * (h + 1) / H) * abs(at[i] - key_at[j])
                    scores.append(math.exp(score))
                    values.append(head(wv, mem[b, j], h // (H // K), key_at[j], is_value=True))
                mixed += [sum(s / sum(scores) * v[e] for s, v in zip(scores, values, strict=True)) for e in range(E)]
            out[b, i] = m.out.weight @ torch.tensor(mixed)
    return out


@pytest.mark.parametrize("qk_norm", [False, True, "separate"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", ["dense", "middle", "packed"])
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["standard", "multi_head", "grouped_query"])
@torch.no_grad()
def test_softmax_written_out(name: str, role: Role, kind: str, position: str, qk_norm: bool) -> None:
    module = build(name, role, qk_norm=qk_norm)
    assert isinstance(module, GroupedQuery)
    x, seq = torch.randn(2, 7, DIM), sequence(kind, position)
    assert_real_equal(module(x, seq), written_out(module, x, seq, x, seq, position), seq)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", ["dense", "left", "middle"])
@pytest.mark.parametrize("name", SOFTMAX)
@torch.no_grad()
def test_cross_written_out(name: str, kind: str, position: str, qk_norm: bool) -> None:
    module = build(name, "cross", qk_norm=qk_norm)
    assert isinstance(module, GroupedQuery)
    x, seq, memory = torch.randn(2, 4, DIM), sequence("dense", position, 4), torch.randn(2, 7, DIM)
    memory_seq = sequence(kind, position)
    actual = module(x, seq, memory=Memory(memory, memory_seq))
    assert_real_equal(actual, written_out(module, x, seq, memory, memory_seq, position), seq)


@pytest.mark.parametrize("kind", ["dense", "right"])
@pytest.mark.parametrize("role", ["causal", "bidirectional", "cross"])
def test_multi_head_is_torch_multihead(role: Role, kind: str) -> None:
    module = MultiHead(DIM, role, num_heads=4, qk_norm=False, bias=True)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    reference = nn.MultiheadAttention(DIM, 4, batch_first=True)
    with torch.no_grad():
        parts = [module.q, module.kv] if role == "cross" else [module.qkv]
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(module.out.state_dict())
    x, seq = torch.randn(2, 7, DIM), sequence(kind)
    query, query_seq = (torch.randn(2, 3, DIM), Sequence.dense(3)) if role == "cross" else (x, seq)
    expected, _ = reference(
        query,
        x,
        x,
        key_padding_mask=None if seq.segments_BT is None else seq.segments_BT == 0,
        attn_mask=torch.ones(7, 7).triu(1).bool() if role == "causal" else None,
    )
    actual = module(query, query_seq, memory=Memory(x, seq) if role == "cross" else None)
    assert_real_equal(actual, expected, query_seq)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_query_is_multi_head_with_repeated_keys(num_kv_heads: int, position: str) -> None:
    grouped = GroupedQuery(DIM, "causal", num_heads=4, num_kv_heads=num_kv_heads)
    full = MultiHead(DIM, "causal", num_heads=4)
    q, k, v = torch.split(grouped.qkv.weight.data, [8, 2 * num_kv_heads, 2 * num_kv_heads])
    k, v = (part.view(num_kv_heads, 2, DIM).repeat_interleave(4 // num_kv_heads, 0).flatten(0, 1) for part in (k, v))
    full.qkv.weight.data = torch.cat([q, k, v])
    full.out.load_state_dict(grouped.out.state_dict())
    x, seq = torch.randn(2, 7, DIM), sequence("packed", position)
    torch.testing.assert_close(grouped(x, seq), full(x, seq))


def per_document(module: Recurrent, x: Tensor, seq: Sequence) -> Tensor:
    """Run a fresh torch.nn network over one document after the other."""
    both = module.role == "bidirectional"
    kind = nn.LSTM if isinstance(module, LSTM) else nn.GRU
    reference = kind(DIM, DIM // 2 if both else DIM, bidirectional=both)
    reference.load_state_dict(module.rnn.state_dict())
    out = torch.zeros_like(x)
    for row, own in documents(seq):
        out[row, own] = reference(x[row, own, None])[0][:, 0]
    return out


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize("variant", [LSTM, GRU])
def test_recurrent_document_by_document(variant: type[LSTM] | type[GRU], role: Role, kind: str) -> None:
    module = variant(DIM, role)
    x, seq = torch.randn(2, 7, DIM, requires_grad=True), sequence(kind)
    actual, expected = module(x, seq), per_document(module, x, seq)
    torch.testing.assert_close(actual, expected)  # zeros at padding included
    weights = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), x), torch.autograd.grad((expected * weights).sum(), x)
    )


def test_recurrent_many_documents() -> None:
    segments = (torch.rand(5, 60) < 0.3).long().cumsum(-1) * (torch.rand(5, 60) < 0.8)
    x, seq = torch.randn(5, 60, DIM), Sequence.from_segments(segments)
    module = LSTM(DIM, "causal")
    reference = torch.zeros_like(x)
    for row, own in documents(seq, 5):
        reference[row, own] = module.rnn(x[row : row + 1, own])[0][0]
    torch.testing.assert_close(module(x, seq), reference)


@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize("variant", [LSTM, GRU])
def test_recurrent_rows_equal_packed_documents(
    monkeypatch: pytest.MonkeyPatch, variant: type[LSTM] | type[GRU], role: Role
) -> None:
    """In single precision, which the fast kernels take."""
    module = variant(DIM, role).float()
    segments = (torch.rand(4, 30) < 0.2).long().cumsum(-1) * (torch.rand(4, 30) < 0.8)
    x, weights = torch.randn(4, 30, DIM, dtype=torch.float32, requires_grad=True), torch.rand(4, 30, DIM)
    found = []
    for most in (0.0, 1e9):
        monkeypatch.setattr(recurrent, "PADDED", most)
        y = module(x, Sequence.from_segments(segments))
        found.append([y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])])
    for packed, rows in zip(*found, strict=True):
        torch.testing.assert_close(rows, packed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_without_memory_has_the_same_shapes(name: str) -> None:
    def shapes(device: str) -> list[tuple[torch.Size, torch.dtype]]:
        with torch.device(device):
            module, x = build(name), torch.zeros(2, 7, DIM)
        state = module.init_state(2, 9, x)
        assert state is not None
        y = module(x, Sequence.dense(7, device), state=state)
        return [(value.shape, value.dtype) for value in (y, *state.values())]

    assert shapes("meta") == shapes("cpu")


def test_recurrent_layers_share_the_documents() -> None:
    x, seq = torch.randn(2, 7, DIM), sequence("packed")
    first, second = LSTM(DIM, "causal"), GRU(DIM, "causal")
    hidden = first(x, seq)
    docs = seq.memo["documents"]
    torch.testing.assert_close(second(hidden, seq), per_document(second, hidden, seq))
    assert seq.memo["documents"] is docs


def test_recurrent_batch_of_padding() -> None:
    module = LSTM(DIM, "causal")
    x, seq = torch.randn(2, 3, DIM), Sequence.from_segments(torch.zeros(2, 3, dtype=torch.long))
    state = module.init_state(2, 3, x)
    assert state is not None
    assert not module(x, seq, state=state).any() and not state["h"].any() and state.length == 3


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_decoding_equals_full(name: str, kind: str, position: str, cuts: list[int]) -> None:
    module, seq, x = build(name), sequence(kind, position), torch.randn(2, 7, DIM)
    actual, _ = decode(module, x, seq, cuts)
    assert torch.isfinite(actual).all()
    assert_real_equal(actual, module(x, seq), seq)


@pytest.mark.parametrize("kind", ["dense", "left"])
@pytest.mark.parametrize("name", SOFTMAX)
@torch.no_grad()
def test_cross_decoding_keeps_the_memory(name: str, kind: str) -> None:
    module, seq = build(name, "cross"), sequence("dense")
    x, memory = torch.randn(2, 7, DIM), Memory(torch.randn(2, 7, DIM), sequence(kind))
    expected = module(x, seq, memory=memory)
    actual, _ = decode(module, x, seq, [3, 1, 3], memory=memory)
    torch.testing.assert_close(actual, expected)

    state, rows = module.init_state(2, 7, x), torch.tensor([1, 0, 1])
    assert state is not None
    module(x[:, :2], columns(seq, 0, 2), memory=memory, state=state)
    state.reorder(rows)
    other = Memory(torch.randn(2, 7, DIM), sequence("dense"))
    torch.testing.assert_close(module(x[rows, 2:], columns(seq, 2, 7), memory=other, state=state), expected[rows, 2:])
    masked = Sequence(columns(seq, 2, 7).positions_BT, torch.ones(3, 5, dtype=torch.long))
    torch.testing.assert_close(module(x[rows, 2:], masked, state=state), expected[rows, 2:])


@pytest.mark.parametrize("name", SOFTMAX)
def test_no_room_left(name: str) -> None:
    module, x = build(name), torch.randn(1, 4, DIM)
    state = module.init_state(1, 3, x)
    with pytest.raises(ValueError, match="room for 3 columns, got 4"):
        module(x, Sequence.dense(4), state=state)


def test_roles() -> None:
    x = torch.randn(1, 2, DIM)
    assert MultiHead.roles == {"causal", "bidirectional", "cross"} and LSTM.roles == {"causal", "bidirectional"}
    assert all(build(name, "bidirectional").init_state(1, 2, x) is None for name in ALL)
    with pytest.raises(ValueError, match="memory"):
        build("multi_head", "cross")(x, Sequence.dense(2))


def test_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding and bias no mask is ever built, and a step of decoding adds little to the matrix products."""
    calls: list[dict[str, Any]] = []
    plain = F.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    x = torch.randn(2, 7, DIM)
    causal, both, cross = (build("multi_head", role) for role in ("causal", "bidirectional", "cross"))
    causal(x, sequence("dense", "rotary"))
    decode(causal, x, sequence("dense", "rotary"), [5, 1, 1])
    both(x, sequence("dense", "rotary"))
    memory = Memory(x, sequence("dense"))
    cross(x, sequence("dense"), memory=memory)
    decode(cross, x, sequence("dense"), [5, 1, 1], memory=memory)
    assert all(call["attn_mask"] is None for call in calls)
    assert [call["is_causal"] for call in calls] == [True, True] + [False] * 7
    causal(x, sequence("right"))
    assert calls[-1]["attn_mask"].dtype is torch.bool and not calls[-1]["is_causal"]


def test_layers_share_the_bias() -> None:
    """Layers of one pass share what their scores have in common, and nothing else."""
    seq, x = sequence("packed", "alibi"), torch.randn(2, 7, DIM)
    build("multi_head")(x, seq)
    size = len(seq.memo)
    build("grouped_query")(x, seq)
    assert len(seq.memo) == size
    for other in (build("standard"), build("multi_head", "bidirectional"), build("multi_head").float()):
        y = x.to(other.out.weight.dtype)  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(other(y, seq), other(y, sequence("packed", "alibi")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((130, 4, 4), "dim 130 is not divisible by num_heads 4; nearest widths: 128, 132"),
        ((3, 4, 4), "dim 3 is not divisible by num_heads 4; nearest widths: 4"),
        ((128, 4, 3), "num_heads 4 is not divisible by num_kv_heads 3; allowed: 1, 2, 4"),
        ((128, 4, 0), "num_heads and num_kv_heads must be at least 1, got 4 and 0"),
    ],
)
def test_heads_that_do_not_fit(args: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        GroupedQuery(args[0], "causal", args[1], args[2])
    assert str(error.value) == message


def test_a_width_of_the_heads_and_a_bias_without_that_of_the_output() -> None:
    wide = GroupedQuery(10, "causal", 4, 2, bias="qkv", head_dim=6)
    assert wide.qkv.weight.shape == (48, 10) and wide.out.weight.shape == (10, 24)
    assert wide.qkv.bias is not None and wide.out.bias is None
    assert wide.mixing_flops(8) == 4 * 8 * 24 * 0.5
    with pytest.raises(UserError, match="head_dim must be at least 1, got 0"):
        GroupedQuery(10, "causal", 4, 2, head_dim=0)
    with pytest.raises(UserError, match="scale must be above 0, got 0"):
        GroupedQuery(10, "causal", 4, 2, head_dim=6, scale=0.0)


def test_a_scale_of_the_scores_is_a_factor_of_the_queries() -> None:
    usual, own = (MultiHead(8, "causal", 2, qk_norm=False, scale=scale) for scale in (None, 0.7))
    own.load_state_dict(usual.state_dict())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        usual.qkv.weight[:8] *= 0.7 * 2  # a head is four channels wide
        torch.testing.assert_close(own(x, Sequence.dense(5)), usual(x, Sequence.dense(5)))


def test_odd_width_for_two_directions() -> None:
    with pytest.raises(UserError, match="dim 5 must be even for two directions; nearest widths: 4, 6"):
        LSTM(5, "bidirectional")


def test_sizes() -> None:
    """Parameters and FLOPs, counted by hand for a width of 8."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(build("standard")) == 4 * 64 + 8
    assert count(build("multi_head", "cross")) == 4 * 64 + 2
    assert count(build("grouped_query")) == 3 * 64 + 2
    assert count(build("multi_query", qk_norm=False)) == int(2.5 * 64)
    assert count(build("lstm")) == 8 * 64 + 64 and count(build("lstm", "bidirectional")) == 6 * 64 + 64
    assert count(build("gru")) == 6 * 64 + 48 and count(build("gru", "bidirectional")) == int(4.5 * 64) + 48
    # Two products of (length x E) and (E x length) a head; the causal half is what position (length / 2) sees.
    assert build("multi_head", "bidirectional").mixing_flops(10) == 2 * (2 * 10 * 8)
    assert build("multi_head").mixing_flops(10) == 2 * (2 * 5 * 8)
    assert build("lstm").mixing_flops(10) == 0


@torch.no_grad()
def test_the_file_can_be_copied(tmp_path: Path) -> None:
    """A copy with scores of its own is a variant that decodes; masks, padding and the cache come with it."""
    assert softmax.__file__ is not None
    text = Path(softmax.__file__).read_text()
    changed = text.replace("scale=self.scale,\n", "scale=0.1,\n")
    (tmp_path / "mine.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert changed != text and spec is not None and spec.loader is not None
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    module, seq, x = mine.MultiHead(DIM, "causal"), sequence("packed", "alibi"), torch.randn(2, 7, DIM)
    assert_real_equal(decode(module, x, seq, CUTS[1])[0], module(x, seq), seq)
    usual = MultiHead(DIM, "causal")
    usual.load_state_dict(module.state_dict())
    assert not torch.allclose(usual(x, seq), module(x, seq))


def test_lstm_forget_gate_starts_open() -> None:
    bias = dict(LSTM(DIM, "causal").named_parameters())["rnn.bias_hh_l0"]
    assert ((bias == 1).nonzero().squeeze() == torch.arange(DIM, 2 * DIM)).all()
