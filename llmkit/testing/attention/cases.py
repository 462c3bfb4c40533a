"""What attention variants are tried with: layouts of padding and documents, and position encodings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmkit.contracts import Attention, Position
from llmkit.sequence import Memory, Sequence, State
from llmkit.testing.report import Violation

Segments = list[list[int]]
PADDED: list[Segments] = [
    [[1, 0]],
    [[0, 1]],
    [[1, 0, 1]],
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    [[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    [[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0]],
    [[0, 0, 0], [1, 1, 0]],
]
"""Rows with padding (0), the smallest first."""

PACKED: list[Segments] = [
    [[1, 2]],
    [[1, 2, 2]],
    [[1, 1, 2, 2]],
    [[1, 1, 1, 2, 2, 3, 0], [0, 1, 0, 2, 0, 2, 3]],
]
"""Rows with several documents (1, 2, ...), the smallest first."""

LONG = 160
"""Longer than the blocks and windows that variants usually work in."""


class Turn(Position):
    """A rotary encoding in a few lines: rotates queries and keys pair by pair."""

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        """Rotate each pair of neighbouring channels by an angle proportional to the position; an odd last one stays."""
        pairs = x_BHTE.shape[-1] // 2
        if not pairs:
            return x_BHTE
        speed_P = 0.5 / torch.arange(1, pairs + 1, device=x_BHTE.device, dtype=torch.float64)
        angle_B1TP = seq.positions_BT[:, None, :, None] * speed_P
        cos, sin = angle_B1TP.cos().to(x_BHTE.dtype), angle_B1TP.sin().to(x_BHTE.dtype)
        left, right, rest = x_BHTE[..., : 2 * pairs : 2], x_BHTE[..., 1 : 2 * pairs : 2], x_BHTE[..., 2 * pairs :]
        turned = torch.stack([left * cos - right * sin, left * sin + right * cos], -1).flatten(-2)
        return torch.cat([turned, rest], -1)


class Slope(Position):
    """A penalty on the scores that grows with the distance, at a rate of its own for each head."""

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return minus the distance divided by 2, 3, ... (heads)."""
        distance_B1TS = (query_BT[:, None, :, None] - key_BS[:, None, None, :]).abs()
        return -distance_B1TS / torch.arange(2, num_heads + 2, device=query_BT.device)[:, None, None]


POSITIONS: dict[str, type[Position] | None] = {
    "no positions": None,
    "rotary positions": Turn,
    "biased positions": Slope,
}


def sequence(segments: Segments | None, position: str = "no positions", length: int = 0, dim: int = 0) -> Sequence:
    """Return a new sequence: dense of a length, or with these segments."""
    seq = Sequence.dense(length) if segments is None else Sequence.from_segments(torch.tensor(segments))
    kind = POSITIONS[position]
    seq.position = None if kind is None else kind(dim, 4 * LONG)
    return seq


def part(seq: Sequence, start: int, end: int) -> Sequence:
    """Return some columns of a sequence, as decoding passes them."""
    segments = None if seq.segments_BT is None else seq.segments_BT[:, start:end]
    return Sequence(seq.positions_BT[:, start:end], segments, seq.position)


def documents(segments: Segments) -> Iterator[tuple[int, list[int]]]:
    """Yield (row, columns) of each document, found by a loop over all columns."""
    for row, numbers in enumerate(segments):
        for number in sorted(set(numbers) - {0}):
            yield row, [column for column, other in enumerate(numbers) if other == number]


def run(
    module: Attention, x: Tensor, seq: Sequence, memory: Memory | None = None, state: State | None = None
) -> Tensor:
    """Return the output. Raises Violation unless it is finite and has the input's shape."""
    y = module(x, seq, memory=memory, state=state)
    if not isinstance(y, Tensor):
        raise Violation(f"input {_shape(x)} gave {type(y).__name__}, expected a tensor of that shape")
    if y.shape != x.shape:
        raise Violation(f"input (B, T, D) = {_shape(x)} gave {_shape(y)}")
    if not y.is_meta and not torch.isfinite(y).all():
        bad = (~torch.isfinite(y)).nonzero()[0].tolist()
        padding = "" if seq.segments_BT is None else f", segments {seq.segments_BT.tolist()} (0 is padding)"
        raise Violation(f"input {_shape(x)}{padding}: the output is not finite at row {bad[0]}, column {bad[1]}")
    return y


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
