"""Linear attention against plain loops, whole and in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from llmkit_linear import LinearAttention
from torch import Tensor

from llmkit import UserError
from llmkit.contracts import Role, Sequence

DIM, HEADS = 8, 2
SEGMENTS = {
    "dense": [[1] * 6, [1] * 6],
    "padded": [[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]],
    "packed": [[1, 1, 2, 2, 2, 3], [0, 1, 2, 0, 2, 0]],
}


def by_hand(module: LinearAttention, x_TD: Tensor, segments: list[int]) -> Tensor:
    """Return the outputs of one row, score by score."""
    q, k, v = (part.view(len(segments), HEADS, -1) for part in module.qkv(x_TD).chunk(3, -1))

    def features(vector: Tensor) -> list[float]:
        return [value + 1 if value > 0 else math.exp(value) for value in vector.tolist()]

    def dot(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True))

    rows = []
    for i, segment in enumerate(segments):
        seen = [j for j, other in enumerate(segments) if other == segment and (j <= i or module.role != "causal")]
        mixed = []
        for h in range(HEADS):
            scores = [dot(features(q[i, h]), features(k[j, h])) for j in seen]
            mixed.append(sum(score * v[j, h] for score, j in zip(scores, seen, strict=True)) / sum(scores))
        rows.append(module.out(torch.cat(mixed)))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_outputs(role: Role, kind: str) -> None:
    torch.manual_seed(0)
    module = LinearAttention(DIM, role, num_heads=HEADS).double()
    x_BTD = torch.randn(2, 6, DIM, dtype=torch.float64)
    y_BTD = module(x_BTD, Sequence.from_segments(torch.tensor(SEGMENTS[kind])))
    for row, segments in enumerate(SEGMENTS[kind]):
        torch.testing.assert_close(y_BTD[row], by_hand(module, x_BTD[row], segments))


@pytest.mark.parametrize("cuts", [[1] * 6, [3, 2, 1], [6]])
@pytest.mark.parametrize("kind", SEGMENTS)
@torch.no_grad()
def test_pieces_equal_the_whole(kind: str, cuts: list[int]) -> None:
    torch.manual_seed(0)
    module = LinearAttention(DIM, "causal", num_heads=HEADS).double()
    x_BTD, segments_BT = torch.randn(2, 6, DIM, dtype=torch.float64), torch.tensor(SEGMENTS[kind])
    whole = module(x_BTD, Sequence.from_segments(segments_BT))
    state = module.init_state(2, 6, x_BTD)
    pieces = [
        module(x, Sequence(torch.zeros_like(segments), segments), state=state)
        for x, segments in zip(torch.split(x_BTD, cuts, 1), torch.split(segments_BT, cuts, 1), strict=True)
    ]
    real = segments_BT > 0
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real])


def test_no_state_where_nothing_is_decoded() -> None:
    assert LinearAttention(DIM, "bidirectional").init_state(1, 4, torch.zeros(1)) is None


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="dim 8 is not divisible by num_heads 3"):
        LinearAttention(DIM, "causal", num_heads=3)
