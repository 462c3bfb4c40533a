"""The properties of feedforward networks and norms, which work on each position by itself."""

from __future__ import annotations

import torch

from llmkit.testing.numerics import seeded
from llmkit.testing.parts.subject import Subject, first_properties, last_properties
from llmkit.testing.report import Properties, Violation

SHARED: Properties[Subject] = Properties()
NORM_ONLY: Properties[Subject] = Properties()


@SHARED(
    "an output depends on its own position only",
    "In a language model, positions see what they have to predict: a suspiciously low loss, and useless text.",
)
def position_by_position(subject: Subject) -> None:
    _undisturbed(subject, [(1, 2), (1, 3), (2, 5)], rows=False)


@SHARED(
    "an output depends on its own row only",
    "Results depend on the other texts in the batch, and padding leaks into texts.",
)
def row_by_row(subject: Subject) -> None:
    _undisturbed(subject, [(2, 1), (3, 2)], rows=True)


def _undisturbed(subject: Subject, shapes: list[tuple[int, int]], rows: bool) -> None:
    """Change one position (or row) and check that the outputs of the others stay, in eval and in training mode."""
    what = "row" if rows else "position"
    for training in (False, True):
        module = subject.build().train(training)
        for batch, length in shapes:
            for changed in range(batch if rows else length):
                x = subject.vectors(batch, length)
                other = x.clone()
                index = (changed,) if rows else (slice(None), changed)
                other[index] = subject.vectors(batch, length, 1)[index]
                with seeded(subject.seed):
                    before = module(x)
                with seeded(subject.seed):  # dropout draws the same again
                    after = module(other)
                difference = (after - before).abs().amax(-1).double()
                difference[index] = 0
                if difference.max() > 1e-9 * before.abs().max():
                    at = difference.argmax() // length if rows else difference.argmax() % length
                    raise Violation(
                        f"{'training' if training else 'eval'} mode, {(batch, length, subject.dim)}: changing "
                        f"{what} {changed} changes the output of {what} {int(at)} by {difference.max():.2g}; a mean, "
                        f"softmax or norm over a dimension other than the last?"
                    )


@NORM_ONLY(
    "the output does not grow with the input",
    "It does not normalise: activations grow from layer to layer until training diverges.",
)
@torch.no_grad()
def normalises(subject: Subject) -> str:
    module, x = subject.build(), subject.vectors(2, 3)
    small, large = (float(module(scale * x).square().mean().sqrt()) for scale in (1, 1000))
    if large > 100 * max(small, 1e-6):
        raise Violation(f"inputs of size 1 gave outputs of size {small:.3g}, of size 1000: {large:.3g}")
    return f"of size {small:.2g}"


@NORM_ONLY(
    "zeros and constant, tiny and large inputs give finite outputs and gradients",
    "Training stops with NaN as soon as a row is padding or a unit dies.",
)
def degenerate_inputs(subject: Subject) -> None:
    module = subject.build(torch.float32)
    for value in (0.0, 1.0, -3.0, 1e-20, 1e4):
        x = torch.full((1, 1, subject.dim), value, requires_grad=True)
        y = module(x)
        (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        for name, found in (("output", y), ("gradient", grad)):
            if found is not None and not torch.isfinite(found).all():
                raise Violation(
                    f"float32, every input {value:g}: the {name} is {found.flatten()[0].item()}. A division by a "
                    "norm or deviation of zero? Add an eps under the root."
                )


FEEDFORWARD: Properties[Subject] = Properties(first_properties(), SHARED, last_properties())
NORM: Properties[Subject] = Properties(first_properties(), SHARED, NORM_ONLY, last_properties())
