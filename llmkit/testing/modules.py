"""The properties that several families share, each written once.

A family describes by a ``Usage`` how the framework builds and calls its plugins: an attention variant has one for each
role, a norm has one, a head has one together with its network. The properties below know nothing else of a plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from llmkit.testing.numerics import MarkedMemory, alike, gap, normal, seeded
from llmkit.testing.report import NotApplicable, Property, Violation, one_line, raised
from llmkit.testing.usage import CONTEXT, Subject, Usage

# Outputs that may have a wider dtype than the input: a bias is added to scores, a loss is a sum over many rows.
WIDER = ("bias", "loss")

Run = Callable[[Subject], str | None]


def _property(claim: str, meaning: str, essential: bool = False) -> Callable[[Run], Property[Subject]]:
    return lambda function: Property(function.__name__, claim, meaning, function, essential)


def _place(usage: Usage[Any], name: str = "") -> str:
    found = ", ".join(part for part in (usage.label, name) if part)
    return f"{found}: " if found else ""


def _compare(usage: Usage[Any], actual: Mapping[str, Any], expected: Mapping[str, Any], message: str) -> None:
    """Raise Violation, with the difference in ``message``, unless all results are equal up to rounding."""
    for name, y in actual.items():
        place = _place(usage, name)
        if isinstance(y, Tensor):
            difference = gap(y, expected[name])
            if difference > usage.tolerance:
                raise Violation(place + message.format(f"{difference:.2g} of the largest value"))
        elif not alike(y, expected[name]):
            raise Violation(place + message.format(f"{y!r:.100} in place of {expected[name]!r:.100}"))


@_property("it can be built", "A config that names it stops before training.", essential=True)
def builds(subject: Subject) -> str:
    labels = []
    for usage in subject.usages:
        module = usage.build()
        for name, expected in usage.attributes().items():
            if getattr(module, name, None) != expected:
                actual = getattr(module, name, None)
                raise Violation(f"{_place(usage)}built with {name} {expected!r}, its attribute {name} is {actual!r}")
        labels.append(usage.label.removeprefix("role "))
    roles = f"as {', '.join(labels)}, " if any(labels) else ""
    weights = sum(parameter.numel() for parameter in module.parameters())
    return f"{roles}{module.dim} wide, {weights:,} weights"


@_property(
    "every weight is initialised",
    "The first loss is NaN, but only on some machines and on some days.",
    essential=True,
)
def weights_are_set(subject: Subject) -> None:
    for usage in subject.usages:
        with MarkedMemory():
            module = usage.raw()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and tensor.isnan().any():
                share = tensor.isnan().double().mean()
                raise Violation(
                    f"{_place(usage)}{share:.0%} of '{name}' {tuple(tensor.shape)} is not initialised (torch.empty "
                    "without nn.init?)"
                )


@_property(
    "the output has the expected shape and dtype, and is finite, at any length and batch size",
    "The network stops with an error or, worse, the addition that follows broadcasts.",
    essential=True,
)
@torch.no_grad()
def shape(subject: Subject) -> None:
    for usage in subject.usages:
        module = usage.build()
        for batch, length in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 5), (2, CONTEXT)):
            try:
                usage.outputs(module, usage.inputs(batch, length))
            except (RuntimeError, IndexError) as error:
                where = f"{_place(usage)}input {(batch, length, module.dim)}"
                raise Violation(f"{where} {raised(error)}{usage.hint(module)}") from error
        single = usage.outputs(usage.build(torch.float32), usage.inputs(1, 3).to(torch.float32))
        _check_dtype(usage, single, torch.float32)


def _check_dtype(usage: Usage[Any], outputs: dict[str, Tensor], dtype: torch.dtype, exempt: Sequence[str] = ()) -> None:
    for name, y in outputs.items():
        if y.is_floating_point() and name not in exempt and y.dtype != dtype:
            raise Violation(f"{_place(usage, name)}input and weights are {dtype}, the output is {y.dtype}")


@_property(
    "in eval mode, the same input always gives the same output, whatever came before",
    "Two evaluations of one checkpoint differ; one text changes the answer to the next.",
)
def deterministic(subject: Subject) -> None:
    for usage in subject.usages:
        module, inputs = usage.build(), usage.inputs(2, 5)
        with seeded(0):  # restores the caller's random state; the calls below still draw different numbers
            first = usage.results(module, inputs)
            again = "a second call with the same input differs ({}); is dropout on in eval mode?"
            _compare(usage, usage.results(module, inputs), first, again)
            usage.results(module, usage.inputs(1, 9, 5))
            after = "after a call with another shape, the same input gives another output ({}); a mask kept in self?"
            _compare(usage, usage.results(module, inputs), first, after)


@_property(
    "inputs may have any memory layout, and are not changed",
    "It fails after a transpose, or corrupts the residual stream around the layer.",
)
def layout_of_inputs(subject: Subject) -> None:
    for usage in subject.usages:
        module, inputs = usage.build(), usage.inputs(2, 5)
        before = inputs.clone()
        expected = {name: y.clone() for name, y in usage.results(module, inputs).items()}
        if not all(torch.equal(a, b) for a, b in zip(before.tensors(), inputs.tensors(), strict=True)):
            raise Violation(f"{_place(usage, ', '.join(expected))}the input is modified in place")
        try:
            actual = usage.results(module, inputs.strided())
        except RuntimeError as error:
            raise Violation(f"{_place(usage)}an input that is not contiguous {raised(error)}") from error
        _compare(usage, actual, expected, "the same input in a transposed layout gives another output ({})")


@_property(
    "gradients are finite and correct, in double precision",
    "Training stops with NaN, or goes in a wrong direction.",
)
def gradients(subject: Subject) -> None:
    seen = False
    for usage in subject.usages:
        module = usage.build()
        for inputs in usage.kinds():
            tensors = [*(leaf.requires_grad_() for leaf in inputs.leaves())]
            tensors += [parameter for parameter in module.parameters() if parameter.requires_grad]

            def out(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck changes the tensors in place
                found = usage.outputs(module, inputs).values()  # noqa: B023
                return tuple(inputs.select(y) for y in found if y.requires_grad)  # noqa: B023

            outputs = out()
            if not outputs:
                continue
            seen = True
            shown = f"{_place(usage)}{_shown(inputs)}"
            grads = torch.autograd.grad([y.sum() for y in outputs], tensors, allow_unused=True)
            if any(grad is not None and not torch.isfinite(grad).all() for grad in grads):
                raise Violation(f"{shown}a gradient is not finite")
            try:
                gradcheck(out, tensors, fast_mode=True)
            except GradcheckError as error:
                raise Violation(f"{shown}autograd and finite differences disagree: {one_line(error)}") from error
    if not seen:
        raise NotApplicable("it has no differentiable output")


def _shown(inputs: Any) -> str:
    """Return the segments of an input as messages show them."""
    seq = getattr(inputs, "seq", None) if getattr(inputs, "memory", None) is None else inputs.memory.seq
    return "" if seq is None or seq.segments_BT is None else f"segments {seq.segments_BT.tolist()} (0 is padding): "


@_property(
    "every parameter gets a gradient",
    "Some weights never learn; DDP stops because of unused parameters.",
)
def every_parameter_learns(subject: Subject) -> str:
    zeros = []
    for usage in subject.usages:
        module = usage.build()
        parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not parameters:
            raise NotApplicable("it has no parameters")
        outputs = usage.outputs(module, usage.inputs(8, CONTEXT)).values()
        # A weighted sum: the plain sum of a normalised output, say, is constant and has no gradient.
        total = torch.stack([(y * normal(*y.shape, seed=3)).sum() for y in outputs if y.requires_grad]).sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            if grad is None:
                raise Violation(f"{_place(usage)}'{name}' {tuple(parameter.shape)} is not used: it gets no gradient")
            if not grad.any():
                zeros.append(name)
        if zeros and not usage.allows_zero_gradients:
            raise Violation(f"{_place(usage)}the gradient of {', '.join(zeros)} is 0 for any output")
    return ", ".join(f"the gradient of {name} is 0" for name in zeros)


@_property(
    "bfloat16 agrees with double precision, with bfloat16 weights and under autocast",
    "Mixed precision, the usual way to train, raises an error or gives noise.",
)
@torch.no_grad()
def bfloat16(subject: Subject) -> str:
    worst = 0.0
    for usage, kinds in (usage.low_precision() for usage in subject.usages):
        share, tolerance = usage.rounding
        modules = {dtype: usage.build(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float32)}
        for inputs in kinds:
            half = inputs.to(torch.bfloat16)
            expected = usage.outputs(modules[torch.float64], half.to(torch.float64))
            # Under autocast inputs are in either dtype: a linear map gives bfloat16, an embedding or a norm float32.
            for weights, dtype in (
                (torch.bfloat16, torch.bfloat16),
                (torch.float32, torch.float32),
                (torch.float32, torch.bfloat16),
            ):
                mixed = weights == torch.float32
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    actual = usage.outputs(modules[weights], half.to(dtype))
                if not mixed:
                    _check_dtype(usage, actual, torch.bfloat16, WIDER)
                how = f"under autocast, input in {dtype}" if mixed else "with bfloat16 weights"
                for name, y in actual.items():
                    error = _error(inputs.select(y), inputs.select(expected[name]), share)
                    worst = max(worst, error)
                    if not error < tolerance:
                        raise Violation(
                            f"{_place(usage, name)}{how}, {1 - share:.0%} of the values are off by {error:.1%} or more"
                            f"{usage.rounding_hint()}"
                        )
    return f"off by {worst:.1%}"


def _error(actual: Tensor, expected: Tensor, share: float) -> float:
    """Return the relative error that this share of the positions stays below; whole numbers have to be equal."""
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    difference = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    return float(difference.flatten().quantile(share))


@_property(
    "a state_dict restores everything",
    "A loaded checkpoint is not the model that was saved.",
)
def state_dict(subject: Subject) -> None:
    for usage in subject.usages:
        module, inputs = usage.build(), usage.inputs(5, 5)
        actual, expected = usage.results(usage.restored(module), inputs), usage.results(module, inputs)
        message = "loaded into a new instance it differs ({}); a random tensor that is neither parameter nor buffer?"
        _compare(usage, actual, expected, message)


@_property(
    "it can be built and run on the meta device, without memory",
    "llmkit cannot try out the network or count its parameters before training, or shard it over GPUs.",
)
def meta_device(subject: Subject) -> None:
    for usage in subject.usages:
        with torch.device("meta"):
            module = usage.raw().eval()
        try:
            outputs = usage.outputs(module, usage.inputs(2, 5).to(torch.float32).to("meta"))
        except NotImplementedError as error:  # the framework then skips its trial run, too
            raise NotApplicable(f"it cannot run there: {one_line(error)}") from error
        for name, y in outputs.items():
            if not y.is_meta:
                raise Violation(f"{_place(usage, name)}on the meta device it returns a tensor on {y.device}")
