"""What tests of attention variants share: rows of segments, decoding in pieces, numbers by hand."""

from __future__ import annotations

import cmath
from typing import Any

import torch
from torch import Tensor

from llmkit.contracts import Attention, Position
from llmkit.sequence import Memory, Sequence, State

SEGMENTS: dict[str, list[list[int]]] = {
    "dense": [[1] * 7, [1] * 7],
    "padded": [[1, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1]],
    "packed": [[1, 1, 1, 2, 2, 3, 0], [0, 1, 0, 2, 0, 2, 3]],
    "empty_row": [[0, 0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 0, 5, 5]],
}
CUTS = [[1] * 7, [2, 5], [4, 1, 1, 1]]


def sequence(kind: str, position: Position | None = None) -> Sequence:
    """Return the rows of ``SEGMENTS`` of that name."""
    seq = Sequence.dense(7) if kind == "dense" else Sequence.from_segments(torch.tensor(SEGMENTS[kind]))
    seq.position = position
    return seq


def columns(seq: Sequence, start: int, end: int) -> Sequence:
    """Return some columns of a sequence."""
    segments = None if seq.segments_BT is None else seq.segments_BT[:, start:end]
    return Sequence(seq.positions_BT[:, start:end], segments, seq.position)


def decode(module: Attention, x: Tensor, seq: Sequence, cuts: list[int], **kwargs: Any) -> tuple[Tensor, State]:
    """Return the outputs of pieces of these lengths and the state after them."""
    state = module.init_state(len(x), x.shape[1], x)
    assert state is not None
    parts, start = [], 0
    for size in cuts:
        part = columns(seq, start, start + size)
        parts.append(module(x[:, start : start + size], part, state=state, **kwargs))
        start += size
        assert state.length == start
    return torch.cat(parts, 1), state


def shapes(state: State | None) -> dict[str, torch.Size]:
    """Return the shape of each entry of a state."""
    assert state is not None
    return {name: value.shape for name, value in state.items()}


def turned(vector: list[float], place: int) -> list[float]:
    """Rotary encoding of one head with complex numbers."""
    half = len(vector) // 2
    spun = [complex(vector[i], vector[i + half]) * cmath.exp(1j * place * 10000 ** (-i / half)) for i in range(half)]
    return [z.real for z in spun] + [z.imag for z in spun]


def dot(left: list[float], right: list[float]) -> float:
    """Return the scalar product."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def assert_real_equal(actual: Tensor, expected: Tensor, segments: list[list[int]]) -> None:
    """Compare real columns; those of padding need only be finite."""
    assert torch.isfinite(actual).all()
    real = torch.tensor(segments) > 0
    torch.testing.assert_close(actual[real], expected[real])


def assert_cross_state_keeps_the_memory(module: Attention) -> None:
    """The state reads the memory once, and its rows follow the beams."""
    x, memory = torch.randn(2, 5, module.dim), Memory(torch.randn(2, 7, module.dim), sequence("padded"))
    whole, state = module(x, Sequence.dense(5), memory=memory), module.init_state(2, 5, x)
    assert state is not None
    torch.testing.assert_close(module(x[:, :2], Sequence.dense(2), memory=memory, state=state), whole[:, :2])
    rows = torch.tensor([1, 0, 1])
    state.reorder(rows)
    torch.testing.assert_close(module(x[rows, 2:], Sequence.dense(3), memory=memory, state=state), whole[rows, 2:])
    assert state.length == 5 and state.of_memory


def assert_ragged_prompts_then_tokens_and_beams(module: Attention, position: Position | None = None) -> None:
    """Prompts of unequal length, padded right; then tokens without segments, then rows change places."""
    x = torch.randn(2, 9, module.dim)
    seq = Sequence.from_segments(torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]))
    seq.position = position
    whole, state = module(x, seq), module.init_state(2, 9, x)
    assert state is not None
    module(x[:, :4], columns(seq, 0, 4), state=state)
    for start, end in ((4, 5), (5, 7)):
        part = Sequence(seq.positions_BT[:, start:end], None, position)
        torch.testing.assert_close(module(x[:, start:end], part, state=state), whole[:, start:end])
    rows = torch.tensor([1, 0, 1])
    state.reorder(rows)
    after = Sequence(seq.positions_BT[rows, 7:], None, position)
    torch.testing.assert_close(module(x[rows, 7:], after, state=state), whole[rows, 7:])
