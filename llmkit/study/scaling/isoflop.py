"""Approach 2 of arXiv:2203.15556: a parabola through the losses of each budget, a power law through their vertices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from llmkit.study.scaling.surface import Cost, Floats, Surface, scipy_part

SIZES = 4
"""A parabola needs so many sizes: three would be met exactly, whatever the noise."""
WIDE = 4.0
"""A vertex is not used where its interval covers this factor: 2 to either side."""
VERTICES = 3
"""A power law needs so many."""
GAP, SAME = 1.25, 1.6
"""Budgets so many times apart are different ones; runs of one budget may differ by the factor SAME in all."""
CONFIDENCE = 0.9
"""Of all intervals."""


class Parabola(NamedTuple):
    """The runs of one budget, and loss = offset + slope x + curvature x^2 in the centred log of the size or tokens."""

    budget: float
    runs: list[int]
    """Their indices."""
    centre: float
    """Mean log size."""
    coefficients: tuple[float, float, float]
    """Curvature, slope, offset."""
    vertex: float | None
    """The size with the least loss; None: there is none."""
    interval: tuple[float, float] | None
    """90 % interval of the vertex (Fieller 1954); None: unbounded."""
    refused: str
    """Why the vertex is not used; empty: it is."""

    def loss(self, size: Floats) -> Floats:
        """Return the parabola's loss."""
        return np.asarray(np.polyval(self.coefficients, np.log(size) - self.centre), float)

    @property
    def least(self) -> float | None:
        """The loss at the vertex."""
        return None if self.vertex is None else float(self.loss(np.array(self.vertex)))


class PowerLaw(NamedTuple):
    """size = factor * C^exponent, from vertices."""

    exponent: float
    factor: float
    interval: tuple[float, float]
    """90 % t interval of the exponent."""

    def at(self, C: Floats) -> Floats:
        """Return the size for budgets."""
        return self.factor * np.asarray(C) ** self.exponent


def budgets(C: Floats, given: Floats | None = None) -> list[list[int]]:
    """Return the indices of the runs of each budget, ascending. Runs without two others of their budget are in none.

    Args:
        C: FLOPs of each run.
        given: what budget each run belongs to; None: runs whose FLOPs are close belong together.
    """
    logs = np.log(C if given is None else given)
    order = np.argsort(logs, kind="stable")
    ends = np.flatnonzero(np.diff(logs[order]) > (math.log(GAP) if given is None else 1e-6)) + 1
    found: list[Any] = []
    for group in np.split(order, ends):
        if np.ptp(np.log(C[group])) <= math.log(SAME):
            found.append(group)
            continue
        while len(group):  # runs at all budgets: the windows with the most of them
            starts = logs[group]
            inside = (starts[None] >= starts[:, None]) & (starts[None] <= starts[:, None] + math.log(GAP))
            fullest = inside[int(np.argmax(inside.sum(1)))]
            if fullest.sum() < SIZES:
                break
            found.append(group[fullest])
            group = group[~fullest]
    kept = [sorted(map(int, group)) for group in found if len(group) > 2]
    return sorted(kept, key=lambda group: float(C[group].min()))


def distinct(values: Floats) -> int:
    """Return how many sizes there are; those within 2 % are one, for counts read off a figure."""
    ordered = np.sort(np.log(values))
    return int(len(ordered) > 0) + int((np.diff(ordered) > 0.02).sum())


def parabola(budget: float, runs: list[int], size: Floats, loss: Floats) -> Parabola:
    """Fit the runs of one budget.

    Args:
        budget: in FLOPs.
        runs: their indices in ``size`` and ``loss``.
        size: parameters (or tokens) of all runs.
        loss: of all runs.
    """
    x, y = np.log(size[runs]), loss[runs]
    centre, count = float(x.mean()), distinct(size[runs])

    found = Parabola(budget, runs, centre, (0.0, 0.0, float(y.mean())), None, None, "")
    if count < SIZES:
        return found._replace(refused=f"{count} size{'s' if count > 1 else ''}; {SIZES} are needed")
    design = np.vander(x - centre, 3)
    coefficients = np.asarray(np.linalg.lstsq(design, y, rcond=None)[0], float)
    curvature, slope, offset = map(float, coefficients)
    found = found._replace(coefficients=(curvature, slope, offset))
    if curvature <= 0:
        return found._replace(refused="the losses have no minimum: they curve the wrong way")
    where = -slope / (2 * curvature)
    vertex = math.exp(min(where + centre, 700))
    residuals = y - design @ coefficients
    covariance = np.linalg.inv(design.T @ design) * (residuals @ residuals) / max(len(y) - 3, 1)
    interval = _fieller(coefficients, covariance, len(y) - 3, centre)
    below, above = (distinct(np.exp(x[side])) for side in (x < where + centre, x > where + centre))
    if not below or not above:
        why = "the vertex is outside the sizes that were trained"
    elif min(below, above) < 2:
        why = f"the vertex is at the edge: one size is {'smaller' if below < 2 else 'larger'}"
    elif interval is None:
        why = "the curvature could be 0: any size could be the best"
    elif interval[1] > WIDE * interval[0]:
        why = f"the interval of the vertex covers a factor of {interval[1] / interval[0]:.2g}"
    else:
        why = ""
    return found._replace(vertex=vertex, interval=interval, refused=why)


def _fieller(coefficients: Floats, covariance: Floats, free: int, centre: float) -> tuple[float, float] | None:
    """Return the interval of a vertex, a ratio of two estimates (Fieller 1954); None: it has no ends."""
    t = float(scipy_part("special").stdtrit(free, (1 + CONFIDENCE) / 2))
    curvature, slope, _ = coefficients
    # (slope + 2 v curvature)^2 = t^2 var(slope + 2 v curvature), a quadratic in v
    a = 4 * curvature**2 - 4 * t**2 * covariance[0, 0]
    b = 4 * slope * curvature - 4 * t**2 * covariance[0, 1]
    c = slope**2 - t**2 * covariance[1, 1]
    inner = max(b * b - 4 * a * c, 0.0)
    if a <= 0:
        return None
    ends = [(-b + sign * math.sqrt(inner)) / (2 * a) + centre for sign in (-1, 1)]
    return math.exp(max(ends[0], -700)), math.exp(min(ends[1], 700))


def power_law(parabolas: Iterable[Parabola]) -> PowerLaw | None:
    """Return the power law through the vertices that are used; None: there are too few."""
    used = [one for one in parabolas if not one.refused and one.vertex is not None]
    if len(used) < VERTICES:
        return None
    x = np.log([one.budget for one in used])
    y = np.log([one.vertex for one in used if one.vertex is not None])
    slope, offset = np.polyfit(x - x.mean(), y, 1)
    residuals = y - np.polyval([slope, offset], x - x.mean())
    error = math.sqrt(residuals @ residuals / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    half = error * float(scipy_part("special").stdtrit(len(x) - 2, (1 + CONFIDENCE) / 2))
    factor = math.exp(offset - slope * x.mean())
    return PowerLaw(float(slope), factor, (float(slope) - half, float(slope) + half))


def bias(surface: Surface, groups: Iterable[list[int]], C: Floats, N: Floats, cost: Cost) -> PowerLaw | None:
    """Return what the parabolas would find at the same sizes and budgets if ``surface`` were exact: no noise.

    The difference to the surface's own exponent and sizes is the bias of the method on this grid: a parabola is not the
    shape of the surface, and where sizes do not lie evenly around the optimum its vertex moves to one side.
    """
    found = []
    for group in groups:
        budget = float(np.exp(np.log(C[group]).mean()))
        D = budget / cost.k / N**cost.gamma
        if distinct(N[group]) >= SIZES:
            found.append(parabola(budget, group, N, surface.loss(N, D))._replace(refused=""))
    return power_law(one for one in found if one.vertex is not None)
