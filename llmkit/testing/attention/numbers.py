"""What the numbers of every attention variant owe: gradients, chance, precision, weights, devices, cost."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from llmkit.sequence import Memory, Sequence
from llmkit.testing.attention.cases import (
    PADDED,
    POSITIONS,
    run,
    same,
    sequence,
)
from llmkit.testing.attention.subject import Subject, cast, memory_of, plain
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "gradients are finite and right, in double precision",
    "Training stops with NaN, or goes in a wrong direction.",
)
def gradients(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        for segments in ([[1, 1, 1], [0, 1, 0], [0, 0, 0]], None):
            batch = 1 if segments is None else len(segments)
            x, memory = subject.x(batch, 3).requires_grad_(), memory_of(subject, segments, batch, 3)
            memory.x_BSD.requires_grad_()
            cross, rows = role == "cross", None if role == "cross" else segments
            real_BT1 = torch.ones(batch, 3, 1) if rows is None else (torch.tensor(rows) > 0)[..., None]

            def out(x: Tensor, memory_BSD: Tensor, *_: Tensor, rows: Any = rows, key: Any = memory.seq) -> Tensor:
                given = Memory(memory_BSD, key) if cross else None  # noqa: B023
                return run(module, x, sequence(rows, length=3), given) * real_BT1  # noqa: B023

            inputs = (x, memory.x_BSD, *module.parameters())
            grads = torch.autograd.grad(out(*inputs).sum(), inputs, allow_unused=True)
            if any(grad is not None and not torch.isfinite(grad).all() for grad in grads):
                raise Violation(f"role {role}, segments {segments} (0 is padding): a gradient is not finite")
            try:
                gradcheck(out, inputs, fast_mode=True)
            except GradcheckError as error:
                text = " ".join(str(error).split())[:200]
                raise Violation(f"role {role}, segments {segments}: autograd and finite differences: {text}") from error


@PROPERTIES(
    "every parameter gets a gradient",
    "A part of the weights never learns; DDP stops with unused parameters.",
)
def every_parameter_learns(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise NotApplicable("it has no parameters")
        y = run(module, subject.x(2, 6), Sequence.dense(6), plain(subject, role, 2, 6))
        (y * subject.x(2, 6, 3)).sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any()):
                raise Violation(f"role {role}: '{name}' {tuple(parameter.shape)} has no gradient")


@PROPERTIES(
    "in eval mode the same input gives the same output, whatever came before",
    "Two measurements of one checkpoint differ; one text changes the answer to the next.",
)
def deterministic(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        with torch.no_grad():
            x, memory = subject.x(1, 5), plain(subject, role, 1, 5)
            first = run(module, x, Sequence.dense(5), memory)
            same(
                run(module, x, Sequence.dense(5), memory),
                first,
                f"role {role}: a second call with the same input differs by {{}}; dropout left on in eval mode?".format,
            )
            run(module, subject.x(2, 9, 5), Sequence.dense(9), plain(subject, role, 2, 9))
            told = f"role {role}: after a call with another shape the same input differs by {{}}; a mask kept in self?"
            same(run(module, x, Sequence.dense(5), memory), first, told.format)


@PROPERTIES(
    "dropout works in training and only there",
    "The option does nothing, or evaluation is noisy.",
)
def dropout(subject: Subject) -> None:
    if "dropout" not in inspect.signature(subject.factory).parameters:
        raise NotApplicable("it has no argument 'dropout'")
    for role in subject.roles:
        module, x, memory = subject.build(role, dropout=0.5), subject.x(2, 6), plain(subject, role, 2, 6)
        with torch.no_grad():
            expected = run(subject.build(role, dropout=0.0), x, Sequence.dense(6), memory)
            told = f"role {role}: in eval mode dropout 0.5 differs from dropout 0 by {{}}"
            same(run(module, x, Sequence.dense(6), memory), expected, told.format)
            module.train()
            if torch.equal(*(run(module, x, Sequence.dense(6), memory) for _ in range(2))):
                raise Violation(f"role {role}: in training mode with dropout 0.5 two calls are equal")


@PROPERTIES(
    "bfloat16, pure and by autocast, agrees with double precision",
    "Mixed precision, the usual way to train, gives an error or noise.",
)
def bfloat16(subject: Subject) -> str:
    worst = 0.0
    for role in subject.roles:
        for segments in (None, [[1, 1, 1, 2, 2, 0], [0, 1, 0, 1, 1, 1]]):
            batch, rows = 2, None if role == "cross" else segments
            x = subject.x(batch, 6)
            memory = memory_of(subject, segments, batch, 6) if role == "cross" else None
            real = torch.ones(batch, 6, dtype=torch.bool) if rows is None else torch.tensor(rows) > 0
            with torch.no_grad():
                expected = run(subject.build(role), x, sequence(rows, length=6), memory)[real]
                half = cast(memory, torch.bfloat16)
                pure = run(subject.build(role, torch.bfloat16), x.bfloat16(), sequence(rows, length=6), half)
                if pure.dtype != torch.bfloat16:
                    raise Violation(f"role {role}: a bfloat16 module gave {pure.dtype}")
                with torch.autocast("cpu", torch.bfloat16):
                    single = subject.build(role, torch.float32)
                    mixed = run(single, x.float(), sequence(rows, length=6), cast(memory, torch.float32))
            for name, y in (("bfloat16 weights", pure), ("autocast", mixed)):
                # The median: rounding may turn a hard choice (top-k) at a few positions.
                error = (y[real].double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
                worst = max(worst, float(error.median()))
                if not error.median() < 0.1:
                    raise Violation(f"role {role}, {name}: half of the positions are off by {error.median():.2g}")
    return f"off by {worst:.1%}"


@PROPERTIES(
    "a state_dict brings all of it back",
    "A loaded checkpoint is another model than the one that was saved.",
)
def state_dict(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        fresh = subject.factory(subject.dim, role).double().eval()
        fresh.load_state_dict(module.state_dict())
        with torch.no_grad():
            x, memory = subject.x(1, 5), plain(subject, role, 1, 5)
            expected = run(module, x, Sequence.dense(5), memory)
            told = f"role {role}: loaded into a new one it differs by {{}}; a tensor that is no parameter or buffer?"
            same(run(fresh, x, Sequence.dense(5), memory), expected, told.format)


@PROPERTIES(
    "any memory layout will do, and inputs stay as they were",
    "It fails behind a transpose, or spoils the residual stream of the layer around it.",
)
def layout_of_inputs(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        with torch.no_grad():
            x, memory = subject.x(2, 5), plain(subject, role, 2, 5)
            before = x.clone()
            expected = run(module, x, Sequence.dense(5), memory)
            if not torch.equal(before, x):
                raise Violation(f"role {role}: the input is changed in place")
            strided = x.transpose(0, 1).contiguous().transpose(0, 1)
            told = f"role {role}: with a transposed layout of the same input it differs by {{}}"
            same(run(module, strided, Sequence.dense(5), memory), expected, told.format)


@PROPERTIES(
    "it can be built and run without memory (meta device)",
    "llmkit cannot count its parameters before training, or shard it over GPUs.",
)
def meta_device(subject: Subject) -> None:
    for role in subject.roles:
        with torch.device("meta"):
            module = subject.factory(subject.dim, role).eval()
            x = torch.empty(2, 5, subject.dim)
            memory = Memory(torch.empty(2, 3, subject.dim), Sequence.dense(3, "meta")) if role == "cross" else None
            y = module(x, Sequence.dense(5, "meta"), memory=memory)
        if not y.is_meta:
            raise Violation(f"role {role}: built on the meta device it returns a tensor on {y.device}")


@PROPERTIES(
    "torch.compile gives the same numbers",
    "model.compile: true changes results.",
)
def compiles(subject: Subject) -> str:
    if subject.compile_backend is None:
        raise NotApplicable("left out")
    role = subject.roles[0]
    module, x, memory = subject.build(role), subject.x(2, 7), plain(subject, role, 2, 7)
    with torch.no_grad():
        expected = run(module, x, Sequence.dense(7), memory)
        torch._dynamo.reset()
        try:
            compiled: Any = torch.compile(module, backend=subject.compile_backend)
            actual = run(compiled, x, Sequence.dense(7), memory)
        finally:
            torch._dynamo.reset()
    same(actual, expected, f"role {role}: compiled by {subject.compile_backend} it differs by {{}}".format)
    return f"{subject.compile_backend}"


@PROPERTIES(
    "it equals its slow reference",
    "It computes something else than it says: a scale, a head order, a sign.",
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
                told = f"role {role}, {position}, segments {rows}: it differs by {{}} from the reference"
                same(y[real], expected[real], told.format)


@PROPERTIES(
    "time and memory grow with the length as told",
    "Long texts cost more than expected.",
)
def growth(subject: Subject) -> str:
    """A figure rather than a verdict: the exponents of time and of memory kept for the backward pass."""
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
                y = run(module, x, Sequence.dense(length), cast(plain(subject, role, 1, length), torch.float32))
            y.sum().backward()
            spent.append(time.process_time() - start)
        times.append(min(spent))
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
    ratio = torch.tensor(lengths[1] / lengths[0]).log()
    time_exponent, memory_exponent = (float(torch.tensor(b / max(a, 1e-9)).log() / ratio) for a, b in (times, sizes))
    return f"training: time ~ T^{time_exponent:.1f}, memory ~ T^{memory_exponent:.1f}"
