"""Properties of the map that a variant declares for ``llmkit explain``."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Mixing, Sequence
from llmkit.testing.attention.cases import LONG, PACKED, PADDED, POSITIONS, Segments, run, sequence
from llmkit.testing.attention.subject import Subject, memory_of
from llmkit.testing.numerics import same
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()
LAYOUTS: list[Segments | None] = [None, PADDED[3], PADDED[5], PACKED[3]]
MEMORIES: list[Segments | None] = [None, PADDED[3], PADDED[4]]


@PROPERTIES(
    "a declared map makes the layer's output from its values",
    "llmkit explain shows weights that the layer does not have.",
)
@torch.no_grad()
def map_gives_output(subject: Subject) -> str:
    unit = ""
    for role in subject.roles:
        module = subject.build(role)
        for segments, position, length in _cases(role):
            x, seq, memory = _inputs(subject, role, segments, position, length)
            found = mapped(module, x, seq, memory)
            expected = run(module, x, *_inputs(subject, role, segments, position, length)[1:])
            y = found.output()
            if y.shape != expected.shape:
                raise Violation(f"role {role}: mixing().output() is {tuple(y.shape)}, expected {tuple(expected.shape)}")
            real = _real(None if role == "cross" else segments, x)
            message = f"{_where(role, segments, position, length)}: the map gives an output that differs by {{}}"
            same(y[real], expected[real], message.format)
            unit = found.unit
    return f"one a {unit}"


@PROPERTIES(
    "a declared map is zero where the layer may not look",
    "llmkit explain shows a word resting on the future, on padding, or on another document.",
)
@torch.no_grad()
def map_is_masked(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        for segments, position, length in _cases(role):
            x, seq, memory = _inputs(subject, role, segments, position, length)
            weights = mapped(module, x, seq, memory).of(slice(None))
            key = None if memory is None else memory.seq
            mask = seq.mask(key, causal=role == "causal")
            if mask is None:
                continue
            wrong = (weights != 0) & ~mask & _real(None if role == "cross" else segments, x)[:, None, :, None]
            if wrong.any():
                row, head, t, s = wrong.nonzero()[0].tolist()
                where = f"row {row}, head {head}, position {t} has the weight {float(weights[row, head, t, s]):.2g}"
                raise Violation(f"{_where(role, segments, position, length)}: {where} of position {s}")


def mapped(module: Attention, x: Tensor, seq: Sequence, memory: Memory | None) -> Mixing:
    """Return the map of a variant. Raises NotApplicable where it declares none, Violation for other shapes."""
    role, found = module.role, module.mixing(x, seq, memory=memory)
    if found is None:
        raise NotApplicable("it declares no map: llmkit explain shows the norm of its Jacobian")
    if not isinstance(found, Mixing):
        raise Violation(f"role {role}: mixing() returned {type(found).__name__}, expected Mixing or None")
    sources = x.shape[1] if memory is None else memory.x_BSD.shape[1]
    values, weights = found.values_BHSE, found.of(slice(None))
    expected = (len(x), values.shape[1], x.shape[1], sources)
    if values.dim() != 4 or values.shape[2] != sources or weights.shape != expected:
        raise Violation(
            f"role {role}: weights are {tuple(weights.shape)} and values {tuple(values.shape)}, "
            f"expected (B, H, T, S) = {expected} and (B, H, S, E)"
        )
    return found


def _cases(role: Role) -> list[tuple[Segments | None, str, int]]:
    layouts = MEMORIES if role == "cross" else LAYOUTS
    cases = [(segments, position, 7) for segments in layouts for position in POSITIONS]
    return [*cases, (None, "rotary positions", LONG)]


def _inputs(
    subject: Subject, role: Role, segments: Segments | None, position: str, length: int
) -> tuple[Tensor, Sequence, Memory | None]:
    batch = 1 if segments is None else len(segments)
    x = subject.x(batch, length)
    if role == "cross":
        memory = memory_of(subject, segments, batch, 7)
        return x, sequence(None, position, length, subject.dim), memory
    return x, sequence(segments, position, length, subject.dim), None


def _real(segments: Segments | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool) if segments is None else torch.tensor(segments) > 0


def _where(role: Role, segments: Segments | None, position: str, length: int) -> str:
    shown = f"length {length}" if segments is None else f"segments {segments} (0 is padding)"
    return f"role {role}, {position}, {shown}"
