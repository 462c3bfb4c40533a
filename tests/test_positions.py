"""Position encodings against their formulas, and how positions and masks follow from segments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import decided
from torch import Tensor, nn

from llmkit.contracts import Position
from llmkit.errors import UserError
from llmkit.sequence import Sequence, positions_in_segments
from llmkit_plugins.position import Alibi, Learned, NoPosition, Relative, Rotary, Sinusoidal, slopes


@pytest.mark.parametrize("dim", [8, 7])
def test_sinusoidal_is_the_formula(dim: int) -> None:
    positions = torch.tensor([[0, 1, 5], [300, 2, 4999]])
    added = Sinusoidal(dim, 16).add(torch.ones(2, 3, dim), positions)
    for b in range(2):
        for t in range(3):
            for channel in range(dim):
                angle = positions[b, t].item() / 10000 ** ((channel - channel % 2) / dim)
                wave = math.cos(angle) if channel % 2 else math.sin(angle)
                assert added[b, t, channel].item() == pytest.approx(dim**0.5 + wave, abs=1e-3)


@pytest.mark.parametrize("dim", [8, 7])
def test_sinusoidal_in_halves_is_exact_far_away(dim: int) -> None:
    """A table that was computed in double precision; in single precision position 4,999 is off by 2e-4."""
    x, positions = torch.randn(1, 3, dim), torch.tensor([[0, 511, 4999]])
    for scale in (True, False):
        added = Sinusoidal(dim, 16, "halves", scale).add(x, positions) - x * (dim**0.5 if scale else 1)
        for t, position in enumerate(positions[0].tolist()):
            angles = [position / 10000 ** (pair / dim) for pair in range(0, dim, 2)]
            waves = [*map(math.sin, angles), *map(math.cos, angles)][:dim]
            assert added[0, t].tolist() == pytest.approx(waves, abs=1e-6)


def test_learned_reads_its_table() -> None:
    position = Learned(4, 6)
    x, positions = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [5, 0, 0]])
    table = position.table.weight
    expected = torch.stack([x[b, t] + table[positions[b, t]] for b in range(2) for t in range(3)]).view(2, 3, 4)
    torch.testing.assert_close(position.add(x, positions), expected)
    assert table.std() < 0.05


@pytest.mark.parametrize("positions", [torch.arange(7)[None], torch.tensor([[6]])])
def test_learned_ends_at_the_context(positions: Tensor) -> None:
    with pytest.raises(UserError, match="learned positions end at context 6, got 7 positions"):
        Learned(4, 6).add(torch.zeros(1, positions.shape[1], 4), positions)


def complex_rotary(x_BHTE: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    half = x_BHTE.shape[-1] // 2
    frequency = torch.tensor([base ** (-2 * i / x_BHTE.shape[-1]) for i in range(half)], dtype=torch.float64)
    angle = positions_BT[:, None, :, None].double() * frequency
    pairs = torch.complex(x_BHTE[..., :half].double(), x_BHTE[..., half:].double())
    spun = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([spun.real, spun.imag], -1)


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize("width", [2, 6, 32])
def test_rotary_is_complex_multiplication(width: int, base: float) -> None:
    x = torch.randn(2, 3, 5, width)
    for positions in (torch.arange(5)[None], torch.tensor([[0, 1, 2, 0, 1], [0, 0, 90, 91, 700]])):
        seq = Sequence(positions, position=Rotary(64, 16, base=base))
        expected = complex_rotary(x, positions, base)
        torch.testing.assert_close(seq.rotate(x).double(), expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(seq.rotate(x[:, :1]).double(), expected[:, :1], atol=2e-4, rtol=0)  # from the memo
        assert seq.rotate(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"factor": 2.0}, "scaling: unknown rope_type 'None'. Allowed: linear, llama3, yarn."),
        ({"rope_type": "lineer", "factor": 2.0}, "Did you mean 'linear'?"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            "llama3 needs high_freq_factor, original_max_",
        ),
        ({"rope_type": "linear", "factor": 0}, "scaling: factor must be a number above 0, got 0"),
        ({"rope_type": "linear", "factor": "2"}, "scaling: factor must be a number above 0, got '2'"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "scaling: unknown number 'mscale'"),
    ],
)
def test_a_scaling_is_checked(scaling: dict[str, Any], says: str) -> None:
    """What scalings compute is compared with transformers in test_hf.py."""
    with pytest.raises(UserError, match=re.escape(says)):
        Rotary(8, 16, scaling=scaling)


def test_rotary_scores_depend_on_distance() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)

    def score(query: int, key: int) -> Tensor:
        rotary = Rotary(32, 16)
        q_turned, k_turned = (
            Sequence(torch.tensor([[at]]), position=rotary).rotate(x) for x, at in ((q, query), (k, key))
        )
        return (q_turned * k_turned).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1007, 1003), atol=1e-3, rtol=0)
    torch.testing.assert_close(score(3, 7), score(0, 4), atol=1e-5, rtol=0)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_rotary_shares_its_table_in_one_pass_only() -> None:
    rotary, x = Rotary(8, 4), torch.randn(1, 1, 3, 8)
    seq = Sequence.dense(3)
    seq.position = rotary
    seq.rotate(x)
    (table,) = seq.memo.values()
    seq.rotate(x)
    assert next(iter(seq.memo.values())) is table
    assert not rotary.state_dict()
    half = rotary.bfloat16()
    later = Sequence(torch.tensor([[1000, 1001, 1002]]), position=half)
    torch.testing.assert_close(later.rotate(x).double(), complex_rotary(x, later.positions_BT, 1e4), atol=1e-3, rtol=0)


def test_rotary_needs_even_heads() -> None:
    seq = Sequence(torch.arange(3)[None], position=Rotary(9, 4))
    with pytest.raises(UserError, match="even width of each head, got 3"):
        seq.rotate(torch.randn(1, 3, 3, 3))


def test_alibi_slopes_of_the_paper() -> None:
    def found(num_heads: int) -> list[float]:
        return slopes(num_heads).tolist()

    assert found(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert found(16) == pytest.approx([2 ** (-(i + 1) / 2) for i in range(16)])
    assert found(4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert found(1) == [1 / 256]
    # Twelve heads: those of eight, then the first, third, fifth and seventh of sixteen.
    assert found(12) == pytest.approx([*found(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert found(3) == pytest.approx([1 / 16, 1 / 256, 1 / 4])
    assert all(len(set(found(n))) == n for n in range(1, 40))


def test_alibi_bias_is_distance_times_slope() -> None:
    query, key = torch.tensor([[4, 5], [0, 1]]), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]])
    bias = Alibi(8, 16).bias(query, key, 3)
    assert bias is not None and bias.shape == (2, 3, 2, 6) and bias.dtype is torch.float32
    for b in range(2):
        for h, slope in enumerate([1 / 16, 1 / 256, 1 / 4]):
            for i in range(2):
                for j in range(6):
                    assert bias[b, h, i, j].item() == pytest.approx(-slope * abs(query[b, i] - key[b, j]).item())


@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 12)])
def test_relative_bias_is_that_of_the_distance(role: Any, buckets: int, most: int) -> None:
    """Ranges counted one by one: single distances first, then ranges that grow by an equal factor up to the last."""
    ranges = buckets if role == "causal" else buckets // 2
    single = ranges // 2
    starts = [*range(single), *(single * (most / single) ** (k / (ranges - single)) for k in range(ranges - single))]
    position = Relative(8, 16, role, 3, buckets, most)
    query, key = torch.tensor([[140, 3], [0, 20]]), torch.arange(0, 290, 3)[None]
    bias = position.bias(query, key, 3)
    assert bias is not None and bias.shape == (2, 3, 2, 97) and position.table is not None
    for b in range(2):
        for i in range(2):
            for j in range(97):
                offset = int(key[0, j] - query[b, i])
                far = max(-offset, 0) if role == "causal" else abs(offset)
                bucket = sum(start <= far + 1e-6 for start in starts) - 1
                bucket += ranges if role == "bidirectional" and offset > 0 else 0
                assert torch.equal(bias[b, :, i, j], position.table.weight[bucket]), (offset, bucket)


def test_relative_positions_that_cannot_be() -> None:
    arguments: dict[str, Any]
    for arguments, says in (
        ({"buckets": 3, "role": "bidirectional"}, "buckets must be at least 4, got 3"),
        ({"buckets": 1}, "buckets must be at least 2, got 1"),
        ({"max_distance": 16}, "max_distance must be above 16 with 32 buckets, got 16"),
    ):
        with pytest.raises(UserError, match=says):
            Relative(8, 16, **arguments)
    with pytest.raises(UserError, match="were built for 4 heads, got 2"):
        Relative(8, 16).bias(torch.zeros(1, 1), torch.zeros(1, 1), 2)


def test_no_position_does_nothing() -> None:
    position, x = NoPosition(8, 4), torch.randn(2, 3, 8)
    seq = Sequence(torch.arange(3)[None], position=position)
    assert seq.rotate(x) is x and position.add(x, seq.positions_BT) is x and seq.bias(seq, 2) is None


@pytest.mark.parametrize("kind", [Sinusoidal, Learned, Rotary, Alibi, Relative, NoPosition])
def test_each_kind_does_one_thing(kind: type[Position]) -> None:
    x, heads, seq = torch.randn(1, 3, 8), torch.randn(1, 2, 3, 4), Sequence.dense(3)
    position: nn.Module = Relative(8, 4, bias_heads=2) if kind is Relative else kind(8, 4)
    assert isinstance(position, Position)
    seq.position = position
    adds = not torch.equal(position.add(x, seq.positions_BT), x)
    turns = not torch.equal(seq.rotate(heads), heads)
    biases = seq.bias(seq, 2) is not None
    assert (adds, turns, biases) == (kind in (Sinusoidal, Learned), kind is Rotary, kind in (Alibi, Relative))


def test_positions_count_real_positions_of_each_document() -> None:
    for _ in range(20):
        segments = (torch.rand(4, 17) < 0.3).long().cumsum(-1) * (torch.rand(4, 17) < 0.7)
        expected = torch.zeros_like(segments)
        for b in range(4):
            seen: dict[int, int] = {}
            for t, number in enumerate(segments[b].tolist()):
                if number:
                    expected[b, t] = seen.get(number, 0)
                    seen[number] = seen.get(number, 0) + 1
        assert torch.equal(positions_in_segments(segments), expected)


def test_mask_entry_by_entry() -> None:
    query = Sequence.from_segments(torch.tensor([[1, 1, 2, 0], [0, 1, 1, 2]]))
    for causal in (True, False):
        mask = query.mask(causal=causal)
        assert mask is not None and query.segments_BT is not None
        for b in range(2):
            for i in range(4):
                for j in range(4):
                    same = query.segments_BT[b, i] == query.segments_BT[b, j]
                    assert mask[b, 0, i, j].item() == bool(same and (j <= i or not causal))
    assert Sequence.dense(4).mask(causal=False) is None
    assert Sequence.dense(1, start=4).mask(Sequence.dense(5), causal=True) is None
    late = Sequence.dense(2, start=3).mask(Sequence.dense(5), causal=True)
    assert late is not None and late[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_rotation_tables_are_computed_once_for_all_layers_where_they_are_compiled() -> None:
    """Inductor would compute them again in each layer; it does not look into an operation of its own."""
    calls: list[str] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    net, ids = decided(), torch.randint(29, (2, 9))
    expected = net.decode(ids, Sequence.of(ids))
    net.compile(backend=collect)
    torch.testing.assert_close(net.decode(ids, Sequence.of(ids)), expected, rtol=1e-4, atol=1e-4)
    assert sum("rotary_tables" in call for call in calls) == 1
    assert not any("cos" in call for call in calls)
