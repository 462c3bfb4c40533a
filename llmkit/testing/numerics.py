"""Seeds, weights that show every mistake, and how results compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmkit.testing.report import Violation

TOLERANCE = 1e-6
"""Largest difference of equal results in double precision, relative to the largest value."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the seed of the CPU, switch gradients off, and restore the caller's random state afterwards."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond: see seed_device
        yield


def normal(*shape: int, seed: int) -> Tensor:
    """Return normally distributed numbers in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def disturb(module: nn.Module) -> None:
    """Add noise to constant weights: zeros and ones hide what they do. Positive weights stay positive."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
            noise = (0.3 * torch.randn(parameter.shape)).clamp(-0.9, 0.9).to(parameter)
            parameter.copy_(noise if not parameter.any() else parameter * (1 + noise))


class MarkedMemory(TorchFunctionMode):
    """Fills uninitialised memory (``torch.empty``) with NaN, so that a weight that was never set shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch and mark new memory."""
        new = func(*args, **(kwargs or {}))
        if func in _EMPTY and new.is_floating_point():
            new.fill_(torch.nan)
        return new


_EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)


def gap(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value (inf where there are NaNs)."""
    difference = (actual.double() - expected.double()).abs()
    if not difference.numel():
        return 0.0
    largest = float(difference.amax() / expected.double().abs().amax().clamp(min=1e-3))
    return largest if largest == largest else float("inf")


def same(actual: Tensor, expected: Tensor, message: Callable[[str], str], tolerance: float = TOLERANCE) -> None:
    """Raise Violation unless both are equal; ``message`` makes its text from the size of the difference."""
    difference = gap(actual, expected)
    if difference > tolerance:
        raise Violation(message(f"{difference:.2g} of the largest value"))


def alike(a: Any, b: Any) -> bool:
    """Return whether two answers are the same up to rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) or (a != a and b != b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)
