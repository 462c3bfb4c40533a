"""Properties of attention that concern its numbers and their cost: dropout, compilation, a reference, growth."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor

from llmkit.sequence import Sequence
from llmkit.testing.attention.cases import PADDED, POSITIONS, run, sequence
from llmkit.testing.attention.subject import RoleUsage, Subject, cast, dense_memory, memory_of
from llmkit.testing.numerics import same
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()
LONG_TEXT = 1024
"""Positions over which sums in half precision are lost."""


@PROPERTIES(
    "dropout acts in training mode, and only there",
    "The option does nothing, or evaluation is noisy.",
)
def dropout(subject: Subject) -> None:
    if "dropout" not in inspect.signature(subject.factory).parameters:
        raise NotApplicable("it has no argument 'dropout'")
    for role in subject.roles:
        module, x, memory = subject.build(role, dropout=0.5), subject.x(2, 6), dense_memory(subject, role, 2, 6)
        with torch.no_grad():
            expected = run(subject.build(role, dropout=0.0), x, Sequence.dense(6), memory)
            message = f"role {role}: in eval mode, dropout 0.5 differs from dropout 0 by {{}}"
            same(run(module, x, Sequence.dense(6), memory), expected, message.format)
            module.train()
            if torch.equal(*(run(module, x, Sequence.dense(6), memory) for _ in range(2))):
                raise Violation(f"role {role}: in training mode, two calls with dropout 0.5 are equal")


@PROPERTIES(
    "torch.compile gives the same result",
    "model.compile: true changes results.",
)
def compiles(subject: Subject) -> str:
    if subject.compile_backend is None:
        raise NotApplicable("skipped")
    role = subject.roles[0]
    module, x, memory = subject.build(role), subject.x(2, 7), dense_memory(subject, role, 2, 7)
    with torch.no_grad():
        expected = run(module, x, Sequence.dense(7), memory)
        torch._dynamo.reset()
        try:
            compiled: Any = torch.compile(module, backend=subject.compile_backend)
            actual = run(compiled, x, Sequence.dense(7), memory)
        finally:
            torch._dynamo.reset()
    same(actual, expected, f"role {role}: compiled by {subject.compile_backend}, it differs by {{}}".format)
    return f"{subject.compile_backend}"


@PROPERTIES(
    "it equals its slow reference",
    "It does not compute what it claims to: a wrong scale, head order or sign.",
)
def reference(subject: Subject) -> None:
    if subject.reference is None:
        raise NotApplicable("no reference given")
    for role in subject.roles:
        module = subject.build(role)
        for segments in (None, [[1, 1, 0, 1, 1], [1, 2, 2, 2, 0]]):
            for position in POSITIONS:
                batch, rows = 2, None if role == "cross" else segments
                memory = None
                if role == "cross":
                    memory = memory_of(subject, None if segments is None else PADDED[4], batch, 7)
                x, seq = subject.x(batch, 5), sequence(rows, position, 5, subject.dim)
                with torch.no_grad():
                    y = run(module, x, seq, memory)
                    expected = subject.reference(module, x, sequence(rows, position, 5, subject.dim), memory)
                real = torch.ones(batch, 5, dtype=torch.bool) if rows is None else torch.tensor(rows) > 0
                message = f"role {role}, {position}, segments {rows}: it differs by {{}} from the reference"
                same(y[real], expected[real], message.format)


@PROPERTIES(
    "half precision agrees with double precision at a long text",
    "A running sum or normaliser in half precision: float16 ends at 65,504, and bfloat16 counts no further than 256.",
)
def long_text(subject: Subject) -> str:
    role, worst = subject.roles[0], 0.0
    # Float16 has digits enough for large inputs, which fill its range; bfloat16 has the range of float32.
    for dtype, scale in ((torch.float16, 16.0), (torch.bfloat16, 1.0)):
        x, memory = scale * subject.x(1, LONG_TEXT), dense_memory(subject, role, 1, LONG_TEXT)
        with torch.no_grad():
            expected = run(subject.build(role), x, Sequence.dense(LONG_TEXT), memory)
            single = subject.build(role, torch.float32)
            with torch.autocast("cpu", dtype):
                actual = run(single, x.float(), Sequence.dense(LONG_TEXT), cast(memory, torch.float32))
        last = slice(-LONG_TEXT // 4, None)
        error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
        off = float(error[:, last].flatten().quantile(0.9))  # rounding may turn a hard choice at a few positions
        worst = max(worst, off)
        if not off < RoleUsage.rounding[1]:
            how = f"role {role}, {LONG_TEXT} positions under autocast to {str(dtype).removeprefix('torch.')}"
            raise Violation(f"{how}: 10% of the last positions are off by {off:.1%} or more")
    return f"off by {worst:.1%}"


@PROPERTIES(
    "how time and memory grow with the length",
    "For information only.",
)
def growth(subject: Subject) -> str:
    """Measure the exponents of time and of the memory kept for the backward pass."""
    role = subject.roles[0]
    module = subject.build(role, torch.float32).train()
    lengths, sizes, times = (512, 2048), [], []
    for length in lengths:
        x = subject.x(1, length).float().requires_grad_()
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        spent = []
        for _ in range(3):
            start = time.process_time()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = run(module, x, Sequence.dense(length), cast(dense_memory(subject, role, 1, length), torch.float32))
            y.sum().backward()
            spent.append(time.process_time() - start)
        times.append(min(spent))
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
    ratio = torch.tensor(lengths[1] / lengths[0]).log()
    time_exponent, memory_exponent = (float(torch.tensor(b / max(a, 1e-9)).log() / ratio) for a, b in (times, sizes))
    return f"training: time ~ T^{time_exponent:.1f}, memory ~ T^{memory_exponent:.1f}"
