"""The runs of a study of sizes as the fit takes them, and what its plan is going to show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmkit.study.cells import StudyPlan
from llmkit.study.outcomes import outcome_of
from llmkit.study.scaling.analysis import identify
from llmkit.study.scaling.grid import Point
from llmkit.study.scaling.runs import Runs
from llmkit.study.scaling.spec import ScaleStudy
from llmkit.study.scaling.surface import Surface

BITS = "val_bits_per_byte"
ALPHA, BETA = 0.34, 0.28
"""What a plan assumes."""


def runs_of(rows: Sequence[tuple[Point, str, float, float | None]], by_budget: bool) -> Runs:
    """Return runs from their point, place, loss and bits per byte."""
    points = [point for point, *_ in rows]
    N = np.array([point.size.params for point in points])
    total = np.array([point.size.built.costs["total_params"] for point in points])
    bits = [bits for *_, bits in rows]
    return Runs(
        N,
        np.array([point.tokens for point in points]),
        np.array([loss for _, _, loss, _ in rows]),
        np.array([point.flops for point in points]),
        counted=True,
        sizes={"N_total": total, "N_non_embedding": N},
        budget=np.array([point.target for point in points]) if by_budget else None,
        places=[place for _, place, _, _ in rows],
        bits=None if None in bits else np.array(bits, float),
    )


def ended(cells: StudyPlan, grid: Sequence[Point], variant: str, by_budget: bool) -> tuple[Runs, list[str]]:
    """Return the runs of a variant that have ended with a finite loss, and the names of those that diverged."""
    has_bits = BITS in cells.variants[grid[0].name].facts["sides"] and cells.metric != BITS
    rows, diverged = [], []
    for point in grid:
        if point.size.variant != variant:
            continue
        for cell in cells.final(point.name, "base").values():
            outcome = cells.outcome(cell)
            if outcome is not None and outcome.value is None:
                diverged.append(cell.name)
            elif outcome is not None and outcome.value is not None:
                bits = outcome_of(cells.root / cell.name, BITS) if has_bits else None
                rows.append((point, cell.name, outcome.value, bits and bits.value))
    return runs_of(rows, by_budget), diverged


def foreseen(study: ScaleStudy, grid: Sequence[Point]) -> list[str]:
    """Return what runs at these points would show if a surface with usual exponents were exact but for noise.

    Its E is 1.5; at the geometric mean of sizes and tokens the other two terms are 1 each.
    """
    points = [point for point in grid for _ in range(study.seeds)]
    runs = runs_of([(point, "", 1.0, None) for point in points], study.budgets is not None)
    middle = [float(np.exp(np.log(values).mean())) for values in (runs.N, runs.D)]
    surface = Surface(1.5, middle[0] ** ALPHA, middle[1] ** BETA, ALPHA, BETA)
    noise = 1 + study.noise * np.random.default_rng(0).standard_normal(len(points))
    runs.L = surface.loss(runs.N, runs.D) * noise
    assumed = f"if alpha is {ALPHA}, beta {BETA} and the noise of a run {100 * study.noise:.2g} % of its loss"
    found = identify(runs, draws=60)
    used = [parabola for parabola in found.parabolas if not parabola.refused]
    vertices = f"{len(used)} of {len(found.parabolas)} vertices of parabolas would be used"
    if found.reasons:
        return [f"no exponent, {assumed}; {vertices}", *(f"  - {reason}" for reason in found.reasons)]
    one = found.parameters["exponent"]
    low, high = one["bootstrap"]
    truly = found.cost.exponent(ALPHA, BETA)
    line = f"exponent of N* {one['value']:.3f} (truly {truly:.3f}), 90 % interval {low:.3f} to {high:.3f}"
    return [f"{line}, {assumed}; {vertices}"]
