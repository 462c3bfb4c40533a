"""Checks of positions, feedforward networks and norms: correct ones pass, broken ones are caught."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit import UserError, registry
from llmkit.contracts import Feedforward, Norm, Position
from llmkit.sequence import Sequence
from llmkit.testing import check

FAMILIES = ("position", "feedforward", "norm")
FIRST_PARTY = [(family, name) for family in FAMILIES for name in registry.entries(family)]


@pytest.mark.parametrize(("family", "name"), FIRST_PARTY)
def test_first_party(family: str, name: str) -> None:
    report = check(family, name)
    assert not report.failed, str(report)


def test_figures() -> None:
    def figure(name: str, property: str) -> str:
        return check("position", name, only=[property]).results[0].detail

    answers = {"rotary": "yes", "alibi": "yes", "sinusoidal": "no", "learned": "no"}
    assert {name: figure(name, "relative") for name in answers} == answers
    assert figure("learned", "beyond_the_context") == "it raises a UserError"
    assert figure("alibi", "beyond_the_context") == "it continues"
    assert {result.status for result in check("position", "none").results} == {"pass", "n/a"}


# --- positions


def angles(positions_BT: Tensor, width: int) -> Tensor:
    if width % 2:
        raise UserError("an even width is needed")
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions_BT.device)
    return positions_BT[:, None, :, None] * 100.0 ** (-pairs / width)


def turned(x_BHTE: Tensor, angles: Tensor) -> Tensor:
    left, right = x_BHTE.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x_BHTE.dtype)


class Turns(Position):
    """Right: a rotary encoding."""

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        return turned(x_BHTE, angles(seq.positions_BT, x_BHTE.shape[-1]))


class Buckets(Position):
    """Right: learned biases of bucketed distances for up to 8 heads, beside vectors that are added."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.table = nn.Parameter(torch.zeros(8, 5))
        self.vector = nn.Parameter(torch.zeros(dim))

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTD + (positions_BT % 3)[..., None] * self.vector

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        distance_BTS = (query_BT[:, :, None] - key_BS[:, None, :]).clamp(-2, 2) + 2
        heads = torch.arange(num_heads, device=query_BT.device) % 8
        found: Tensor = self.table[heads][:, distance_BTS].transpose(0, 1)
        return found


class Columns(Position):
    """Broken: column numbers in the place of positions."""

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        numbers = torch.arange(x_BHTE.shape[2], device=x_BHTE.device)[None]
        return turned(x_BHTE, angles(numbers, x_BHTE.shape[-1]))


class CarelessMemo(Position):
    """Broken: what it keeps does not name the width."""

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        if "angles" not in seq.memo:
            seq.memo["angles"] = angles(seq.positions_BT, x_BHTE.shape[-1])
        return turned(x_BHTE, seq.memo["angles"][..., : x_BHTE.shape[-1] // 2])


class HalfAngles(Position):
    """Broken: speeds and positions are rounded to the module's dtype."""

    speeds: Tensor

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.register_buffer("speeds", 0.5 ** torch.arange(4.0))

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        half = x_BHTE.shape[-1] // 2
        if x_BHTE.shape[-1] % 2 or half > 4:
            raise UserError("a width of 2, 4, 6 or 8 is needed")
        return turned(x_BHTE, seq.positions_BT[:, None, :, None].to(self.speeds.dtype) * self.speeds[:half])


class AllAlike(Position):
    """Broken: each position gets the same vector."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.vector = nn.Parameter(torch.zeros(dim))

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTD + self.vector


class NoEnd(Position):
    """Broken: a table without a word about its end."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.table = nn.Embedding(max_length, dim)

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        added: Tensor = x_BTD + self.table(positions_BT)
        return added


class InPlace(Position):
    """Broken: adds to the embeddings in place."""

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTD.add_(positions_BT[..., None])


class FlatBias(Position):
    """Broken: a bias without batch."""

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        return (query_BT[0, :, None] - key_BS[0]).expand(num_heads, -1, -1).double()


class Unset(Position):
    """Broken: a table that nobody fills."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.table = nn.Parameter(torch.empty(max_length, dim))

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTD + self.table[positions_BT % self.max_length]


# --- feedforward networks


class Experts(Feedforward):
    """Right: each position goes to one of two experts, weighted by a gate."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gate = nn.Linear(dim, 2)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        share, chosen = self.gate(x_BTD).softmax(-1).max(-1, keepdim=True)
        y_BTDX = torch.stack([expert(x_BTD) for expert in self.experts], -1)
        y: Tensor = share * y_BTDX.gather(-1, chosen[..., None].expand(*x_BTD.shape, 1))[..., 0]
        return y


class Sine(Feedforward):
    """Right: no weights at all, and dropout."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD.sin(), 0.5, self.training)


class Neighbours(Feedforward):
    """Broken: a convolution over the positions."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.out = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.out(x_BTD.transpose(1, 2)).transpose(1, 2)
        return y


class AlwaysDropout(Feedforward):
    """Broken: dropout in eval mode."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(self.out(x_BTD), 0.2)


class Idle(Feedforward):
    """Broken: a parameter that is not used."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.out, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.out(x_BTD)
        return y


class Hidden(Feedforward):
    """Broken: a random matrix that is neither parameter nor buffer."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.matrix = torch.randn(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD @ self.matrix.to(x_BTD)


class Narrow(Feedforward):
    """Broken: half as wide."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD[..., : self.dim // 2]


# --- norms


class L2(Norm):
    """Right: the norm of the documentation."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = x_BTD / x_BTD.norm(dim=-1, keepdim=True).clamp(min=1e-6) * self.dim**0.5
        return y


class DynamicTanh(Norm):
    """Right: bounded without any statistics."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.slope = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = (self.slope * x_BTD).tanh() * self.weight
        return y


class OverRows(Norm):
    """Broken: statistics of the whole batch."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.norm(x_BTD.transpose(1, 2)).transpose(1, 2)
        return y


class OverPositions(Norm):
    """Broken: statistics of each row, over all its positions."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD / (x_BTD.square().mean((1, 2), keepdim=True) + 1e-6).sqrt()


class NoEps(Norm):
    """Broken: divides by a deviation that may be zero."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return (x_BTD - x_BTD.mean(-1, keepdim=True)) / x_BTD.std(-1, keepdim=True)


class Nothing(Norm):
    """Broken: returns its input."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.clone()


class Detached(Norm):
    """Broken: no gradient through the length."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD / (x_BTD.detach().square().mean(-1, keepdim=True) + 1e-6).sqrt()


RIGHT = [Turns, Buckets, Experts, Sine, L2, DynamicTanh]
BROKEN: list[tuple[type[Any], set[str], str]] = [
    (Columns, {"given_positions", "documents_restart"}, "columns 1 to 1 of 2 differ by .* with positions \\[1\\]"),
    (CarelessMemo, {"memo"}, "heads 4 wide, torch.float64, differs"),
    (HalfAngles, {"bfloat16"}, "Buffers are cast along"),
    (AllAlike, {"distinguishes_positions"}, "positions 0 to 39"),
    (NoEnd, {"beyond_the_context"}, "max_length 40, positions up to 40: raised IndexError"),
    (InPlace, {"layout_of_inputs"}, "add: the input is modified in place"),
    (FlatBias, {"shape"}, r"got the shape \(2, 1, 1\), expected \(1 or 1, 2, 1, 1\)"),
    (Unset, {"weights_are_set"}, r"100% of 'table' \(40, 16\) is not initialised"),
    (Neighbours, {"position_by_position"}, r"\(1, 2, 16\): changing position 0 changes the output of position 1"),
    (AlwaysDropout, {"deterministic"}, "a second call with the same input differs"),
    (Idle, {"every_parameter_learns"}, r"'gate.weight' \(16, 16\) is not used"),
    (Hidden, {"state_dict"}, "loaded into a new instance it differs"),
    (Narrow, {"shape"}, r"forward of \(1, 1, 16\), torch.float64: got the shape \(1, 1, 8\)"),
    (OverRows, {"row_by_row", "position_by_position", "normalises"}, r"training mode, \(1, 2, 16\)"),
    (OverPositions, {"position_by_position"}, r"eval mode, \(1, 2, 16\)"),
    (NoEps, {"degenerate_inputs"}, "every input 0: the output is nan"),
    (Nothing, {"normalises"}, "of size 1000"),
    (Detached, {"gradients"}, "autograd and finite differences"),
]


def family_of(cls: type[Any]) -> str:
    return next(family for family in FAMILIES if issubclass(cls, registry.contract(family)))


@pytest.mark.parametrize("cls", RIGHT)
def test_unusual_but_right(cls: type[Any]) -> None:
    report = check(family_of(cls), cls)
    assert not report.failed, str(report)


@pytest.mark.parametrize(("cls", "expected", "message"), BROKEN)
def test_broken(cls: type[Any], expected: set[str], message: str) -> None:
    report = check(family_of(cls), cls)
    found = {result.name: result.detail for result in report.failed}
    assert found.keys() == expected, str(report)
    assert any(re.search(message, detail) for detail in found.values()), str(report)
