"""Checks of attention: every registered variant passes, injected bugs are caught, unusual designs are not."""

from __future__ import annotations

from typing import ClassVar

import plain_attention
import pytest
import torch
from bugs import BUGS, Bug, injected
from plain_attention import PlainAttention
from torch import Tensor, nn

from llmkit import registry
from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence, State
from llmkit.testing import check, examination, properties

test_plain = examination("attention", PlainAttention, reference=plain_attention.reference, compile_backend="aot_eager")


@pytest.mark.parametrize("name", registry.entries("attention"))
def test_registered(name: str) -> None:
    # How time and memory grow is for information, takes seconds, and is measured of other variants here.
    only = [found.name for found in properties("attention") if found.name != "growth" or name == "linear"]
    report = check("attention", name, only=only, compile_backend="aot_eager")
    assert not report.failed, str(report)
    assert [result.name for result in report.results if result.status == "pass"]


@pytest.mark.usefixtures("no_jacobians")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught(bug: Bug) -> None:
    reference = plain_attention.reference if bug.source is plain_attention else None
    report = check("attention", injected(bug), only=["builds", "shape", bug.caught_by], reference=reference)
    assert [result.name for result in report.failed] == [bug.caught_by], str(report)


# Correct variants of unusual design


class StrictPast(Attention):
    """Each position reads the positions before it but not itself; the first reads nothing."""

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        mask = seq.mask(causal=True)
        T = x_BTD.shape[1]
        seen = torch.ones(1, 1, T, T, dtype=torch.bool, device=x_BTD.device) if mask is None else mask
        weights = seen[:, 0].to(x_BTD.dtype).tril(-1)
        mixed = weights @ self.value(x_BTD) / weights.sum(-1, keepdim=True).clamp(min=1)
        out: Tensor = self.out(mixed)
        return out


class TopOne(Attention):
    """Each position copies the value of its highest score: a hard choice."""

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        source, key = (x_BTD, seq) if memory is None else (memory.x_BSD, memory.seq)
        scores = self.q(x_BTD) @ self.k(source).transpose(1, 2)
        mask = seq.mask(None if memory is None else key, causal=self.role == "causal")
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], torch.finfo(scores.dtype).min)
        best = scores.amax(-1, keepdim=True)
        chosen = (scores == best).to(x_BTD.dtype)
        out: Tensor = (chosen / chosen.sum(-1, keepdim=True) * best.sigmoid()) @ self.v(source)
        return out


class Spectral(Attention):
    """A decaying filter over the past, as a product of spectra; padded and packed rows document by document."""

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        self.rate = nn.Parameter(torch.rand(dim))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        if seq.segments_BT is None:
            return self.filtered(x_BTD)
        out = torch.zeros_like(x_BTD)
        for row in range(len(x_BTD)):
            for number in seq.segments_BT[row].unique():
                columns = (seq.segments_BT[row] == number).nonzero()[:, 0]
                out[row] = out[row].index_copy(0, columns, self.filtered(x_BTD[row : row + 1, columns])[0])
        return out

    def filtered(self, x_BTD: Tensor) -> Tensor:
        T, wide = x_BTD.shape[1], x_BTD.double()
        filter_TD = torch.exp(-torch.arange(T, device=x_BTD.device)[:, None] * (self.rate.double().abs() + 0.1))
        spectrum = torch.fft.rfft(wide, 2 * T, dim=1) * torch.fft.rfft(filter_TD, 2 * T, dim=0)
        out: Tensor = torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T].to(x_BTD.dtype)
        return out


class ZeroStart(PlainAttention):
    """Starts at zero output: its output matrix is zero."""

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class NoWeights(Attention):
    """The mean of a document, without any parameter."""

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        mask, T = seq.mask(causal=self.role == "causal"), x_BTD.shape[1]
        weights = x_BTD.new_ones(1, T, T) if mask is None else mask[:, 0].to(x_BTD.dtype)
        mean: Tensor = weights @ x_BTD / weights.sum(-1, keepdim=True)
        return mean


UNUSUAL = [(seed, variant) for seed in (0, 1) for variant in (StrictPast, TopOne, Spectral, NoWeights)]


@pytest.mark.parametrize(("seed", "variant"), [*UNUSUAL, (1, ZeroStart)])
def test_no_false_alarm(seed: int, variant: type[Attention]) -> None:
    # Compilation does not depend on the seed, and test_plain has that of what ZeroStart inherits; growth is measured
    # there, and here of the one variant without weights.
    whole = seed == 0
    grows = whole and variant is NoWeights
    only = [found.name for found in properties("attention") if grows or found.name != "growth"]
    report = check("attention", variant, seed=seed, only=only, compile_backend="aot_eager" if whole else None)
    assert not report.failed, str(report)
