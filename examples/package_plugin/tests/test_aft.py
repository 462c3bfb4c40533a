"""AFT against plain loops, and what every attention variant owes the network."""

from __future__ import annotations

import math

import pytest
import torch
from llmkit_aft import AFT
from torch import Tensor

from llmkit import UserError
from llmkit.contracts import Role
from llmkit.sequence import Sequence
from llmkit.testing import examination

# One test a property: nothing ahead, no other document, no padding, decoding in pieces, gradients, precision, ...
test_aft = examination("attention", AFT)


def by_hand(module: AFT, x_TD: Tensor, segments: list[int]) -> Tensor:
    """Return the outputs of one row, number by number."""
    q, k, v = ([vector.tolist() for vector in part] for part in module.qkv(x_TD).chunk(3, -1))
    rows = []
    for i, segment in enumerate(segments):
        seen = [j for j, other in enumerate(segments) if other == segment and (j <= i or module.role != "causal")]
        row = []
        for d in range(len(v[i])):
            weights = [math.exp(module.limit * math.tanh(k[j][d] / module.limit)) for j in seen]
            mean = sum(w * v[j][d] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            row.append(mean / (1 + math.exp(-q[i][d])))
        rows.append(module.out(torch.tensor(row, dtype=torch.float64)))
    return torch.stack(rows)


@pytest.mark.parametrize("segments", [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [1, 2, 0, 2, 2, 3]], ids=str)
@pytest.mark.parametrize("role", ["causal", "bidirectional"])
@torch.no_grad()
def test_outputs(role: Role, segments: list[int]) -> None:
    torch.manual_seed(0)
    module, x_TD = AFT(8, role, limit=2.0).double(), torch.randn(6, 8, dtype=torch.float64)
    y_BTD = module(x_TD[None], Sequence.from_segments(torch.tensor([segments])))
    torch.testing.assert_close(y_BTD[0], by_hand(module, x_TD, segments))


def test_limit_out_of_range() -> None:
    with pytest.raises(UserError, match="limit must be above 0 and at most 20, got 0"):
        AFT(8, "causal", limit=0)
