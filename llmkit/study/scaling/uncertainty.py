"""How sure a fitted surface is: a bootstrap over runs, profile likelihoods, and intervals of predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmkit.study.scaling.isoflop import CONFIDENCE
from llmkit.study.scaling.surface import HIGH, LOW, Fit, Floats, Surface, project, scipy_part

PARAMETERS = 5
Interval = tuple[float, float]
Refit = Callable[[Floats, Floats, Floats, Surface], Fit]
"""Fits a surface to (N, D, loss), starting near another one."""


def by_projection(N: Floats, D: Floats, loss: Floats, start: Surface) -> Fit:
    """Fit by variable projection."""
    return project(N, D, loss, start=start, tolerance=1e-4)


def bootstrap(
    N: Floats, D: Floats, loss: Floats, start: Surface, draws: int, refit: Refit = by_projection, seed: int = 0
) -> list[Surface]:
    """Return the surfaces of data sets of the same number of runs, drawn from the runs with replacement.

    A draw with fewer than three sizes or numbers of tokens is drawn again.
    """
    chance = np.random.default_rng(seed)
    found: list[Surface] = []
    while len(found) < draws:
        rows = chance.integers(0, len(loss), len(loss))
        if min(len(np.unique(N[rows])), len(np.unique(D[rows]))) >= 3 and len(np.unique(rows)) >= PARAMETERS:
            found.append(refit(N[rows], D[rows], loss[rows], start).surface)
    return found


def quantiles(values: Sequence[float] | Floats) -> Interval:
    """Return the ends of the 90 % percentile interval."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def profile(N: Floats, D: Floats, loss: Floats, fit: Fit, name: str) -> Interval:
    """Return the 90 % profile likelihood interval of ``alpha``, ``beta``, ``exponent`` or ``E``.

    Inside are the values with which the other parameters still fit the runs: by an F test on the squared residuals. An
    end that was not reached is 0, infinity, or 1 for the exponent.
    """
    free = len(loss) - PARAMETERS
    if free < 1:
        return (0.0, 1.0 if name == "exponent" else math.inf)
    # Of an M-estimator: the variance of the scores over their slope (Huber 1981); RSS / free without outliers.
    pulls, clipped = fit.weights * fit.residuals, fit.weights < 1
    variance = float(pulls @ pulls) / free * float(fit.weights.mean()) / (1 - float(clipped.mean())) ** 2
    limit = fit.objective + variance * float(scipy_part("special").fdtri(1, free, CONFIDENCE)) + 1e-24
    best = float(getattr(fit.surface, name))

    def excess(value: float) -> float:
        held: dict[str, object] = {"E": value} if name == "E" else {"held": (name, value)}
        found = project(N, D, loss, start=fit.surface, weights=fit.weights, tolerance=1e-6, **held)  # type: ignore[arg-type]
        return found.objective - limit

    ends = {"E": (0.0, 0.999 * float(loss.min())), "exponent": (0.01, 0.99)}.get(name, (LOW, HIGH))
    open_ends = {"E": (0.0, float(loss.min())), "exponent": (0.0, 1.0)}.get(name, (0.0, math.inf))
    brentq = scipy_part("optimize").brentq
    found = []
    for end, unbounded in zip(ends, open_ends, strict=True):
        inside = min(max(best, ends[0]), ends[1])
        if inside == end or excess(end) <= 0:
            found.append(unbounded)
        else:
            found.append(float(brentq(excess, inside, end, xtol=1e-5 * max(1.0, abs(end)))))
    return found[0], found[1]


def noise(fit: Fit) -> Floats:
    """Return the relative residuals, larger by what the five parameters took of them."""
    count = len(fit.residuals)
    return fit.residuals * math.sqrt(count / max(count - PARAMETERS, 1))


def predict(fit: Fit, draws: Sequence[Surface], N: Floats, D: Floats, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Return the losses that further runs will have, and the ends of their 90 % intervals.

    Both the doubt about the surface and the noise of a single run are in them.
    """
    chance, own = np.random.default_rng(seed), noise(fit)
    repeats = math.ceil(1000 / len(draws))
    losses = np.stack([surface.loss(N, D) for surface in draws for _ in range(repeats)])
    losses /= 1 + own[chance.integers(0, len(own), losses.shape)]
    low, high = np.quantile(losses, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return fit.surface.loss(N, D), low, high
