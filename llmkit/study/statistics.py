"""Statistics of a study: paired differences to a baseline over common seeds.

The functions work on arrays, so that thousands of simulated studies take the same path as a real one. docs/comparing.md
explains the method and its sources.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmkit.errors import UserError

LEVEL = 0.05
"""How often a study without any difference may claim one."""
POWER = 0.8
"""How often the smallest visible difference is seen."""
MIN_SEEDS = 4
"""With fewer common seeds there is no verdict: a difference would have to be 3.3 standard deviations to be seen."""
MAX_EXACT = 20
"""Up to so many pairs all assignments of signs are enumerated."""
BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
UNCLEAR, NONE = "not distinguishable", "no verdict"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparisons:
    """What decides the verdicts of variants against one baseline; arrays of the shape (..., variants)."""

    seeds: NDArray[np.int64]
    """Seeds with a result of both, diverged runs included."""
    pairs: NDArray[np.int64]
    """Seeds on which both are finite."""
    diverged: NDArray[np.int64]
    """Diverged runs of the variant among ``seeds``."""
    baseline_diverged: NDArray[np.int64]
    mean: Floats
    """Mean difference over ``pairs``, variant minus baseline."""
    sd: Floats
    """Standard deviation of the differences."""
    p: Floats
    """Two-sided p of "no difference"; NaN where there are too few seeds."""
    p_holm: Floats
    p_equivalent: Floats
    """p of "the difference is at least the margin", after Holm; NaN without a margin or where a run diverged."""
    verdict: NDArray[np.str_]


def special() -> Any:
    """Return ``scipy.special``.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        import scipy.special
    except ImportError:
        raise UserError("comparing variants needs the package scipy: pip install 'llmkit[study]'") from None
    return scipy.special


def compare(
    baseline: ArrayLike, variants: ArrayLike, *, lower_is_better: bool = True, margin: float | None = None
) -> Comparisons:
    """Compare variants with a baseline, seed by seed.

    Args:
        baseline: (..., seeds). NaN: no result; infinite: the run diverged.
        variants: (..., variants, seeds), in the same way.
        lower_is_better: The metric is a loss.
        margin: Differences smaller than this do not matter; enables the verdict "equivalent".
    """
    base, other = np.asarray(baseline, float)[..., None, :], np.asarray(variants, float)
    common = ~(np.isnan(base) | np.isnan(other))
    seeds = common.sum(-1)
    diverged, baseline_diverged = (common & np.isinf(other)).sum(-1), (common & np.isinf(base)).sum(-1)
    finished = common & np.isfinite(other) & np.isfinite(base)
    pairs = finished.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        differences = np.where(finished, other - base, 0.0)
        mean = differences.sum(-1) / pairs
        sd = np.sqrt((np.where(finished, differences - mean[..., None], 0.0) ** 2).sum(-1) / (pairs - 1))
    worse = (mean > 0) == lower_is_better
    # The finished runs of something that diverged are its better ones: they cannot show that it is better.
    usable = np.where(worse, baseline_diverged == 0, diverged == 0) & (pairs >= MIN_SEEDS)
    p_mean = np.where(usable, _p_mean(mean, sd, pairs), 1.0)
    p_diverged = _p_diverged(diverged, baseline_diverged, seeds)
    # Where runs diverged, each of the two tests can only claim one direction, so the smaller p needs no correction.
    p = np.where(seeds >= MIN_SEEDS, np.minimum(p_mean, p_diverged), np.nan)
    p_holm = holm(p)
    worse = np.where(p_diverged < p_mean, diverged > baseline_diverged, worse)
    if margin is None:
        p_equivalent = np.full(p.shape, np.nan)
    else:
        complete = (pairs >= MIN_SEEDS) & (diverged + baseline_diverged == 0)
        p_equivalent = holm(np.where(complete, _p_equivalent(mean, sd, pairs, margin), np.nan))
    verdict = np.select(
        [np.isnan(p), p_equivalent <= LEVEL, (p_holm <= LEVEL) & worse, p_holm <= LEVEL],
        [NONE, EQUIVALENT, WORSE, BETTER],
        UNCLEAR,
    )
    return Comparisons(seeds, pairs, diverged, baseline_diverged, mean, sd, p, p_holm, p_equivalent, verdict)


def _constant(mean: Floats, sd: Floats) -> NDArray[np.bool_]:
    """Whether all differences are the same but for rounding, which leaves a t test without a scale."""
    return sd <= 1e-9 * np.abs(mean)


def _p_mean(mean: Floats, sd: Floats, pairs: NDArray[np.int64]) -> Floats:
    """Two-sided p of the paired t test; for constant differences that of the sign test."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * special().stdtr(pairs - 1, -np.abs(mean) / (sd / np.sqrt(pairs)))
        return np.where(_constant(mean, sd), np.where(mean == 0, 1.0, 2.0 ** (1 - pairs)), p)


def _p_equivalent(mean: Floats, sd: Floats, pairs: NDArray[np.int64], margin: float) -> Floats:
    """The larger p of two one-sided t tests (Schuirmann 1987) against -margin and +margin."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = special().stdtr(pairs - 1, (np.abs(mean) - margin) / (sd / np.sqrt(pairs)))
        return np.where(_constant(mean, sd), np.where(np.abs(mean) < margin, 0.5**pairs, 1.0), p)


def _p_diverged(diverged: NDArray[np.int64], other: NDArray[np.int64], seeds: NDArray[np.int64]) -> Floats:
    """Twice the one-sided p of Fisher's exact test that one of two diverges more often."""
    p = np.ones(seeds.shape)
    for index in zip(*np.nonzero(diverged + other), strict=True):
        p[index] = _fisher(max(diverged[index], other[index]), min(diverged[index], other[index]), seeds[index])
    return p


@functools.cache
def _fisher(more: int, fewer: int, runs: int) -> float:
    more, fewer, runs = int(more), int(fewer), int(runs)  # Python's integers do not overflow
    total = more + fewer
    ways = sum(math.comb(runs, k) * math.comb(runs, total - k) for k in range(more, min(runs, total) + 1))
    return min(1.0, 2 * ways / math.comb(2 * runs, total))


def holm(p: ArrayLike) -> Floats:
    """Adjust p-values for the number of comparisons along the last axis (Holm 1979); NaN does not count as one."""
    raw = np.asarray(p, float)
    order = np.argsort(raw, axis=-1)  # NaN last
    ordered = np.take_along_axis(raw, order, -1)
    remaining = (~np.isnan(raw)).sum(-1, keepdims=True) - np.arange(raw.shape[-1])
    adjusted = np.minimum(1.0, np.maximum.accumulate(ordered * remaining, axis=-1))
    result = np.empty_like(raw)
    np.put_along_axis(result, order, adjusted, -1)
    return result


def half_width(sd: ArrayLike, pairs: ArrayLike, comparisons: int = 1) -> Any:
    """Return half the width of the 95 % t interval of a mean difference.

    With ``comparisons`` all their intervals hold together in 95 % of studies (Bonferroni).
    """
    count = np.asarray(pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        return special().stdtrit(count - 1, 1 - LEVEL / 2 / comparisons) * np.asarray(sd) / np.sqrt(count)


def smallest_difference(pairs: int, comparisons: int = 1) -> float:
    """Return the smallest true difference that a study sees with power 0.8, in standard deviations of the difference.

    From the noncentral t distribution. ``comparisons`` is the number of variants that are compared with the baseline:
    the smallest p of Holm's method has to be below 0.05 / comparisons. Infinite for one pair.
    """
    if pairs < 2:
        return math.inf
    bound = special().stdtrit(pairs - 1, 1 - LEVEL / 2 / comparisons)
    return float(special().nctdtrinc(pairs - 1, 1 - POWER, bound) / math.sqrt(pairs))


def sign_flip(differences: ArrayLike) -> float | None:
    """Return the exact two-sided p of the sign-flip test (Fisher 1935); None with fewer than 6 or more than 20 pairs.

    The sum of the differences is compared with its values under all assignments of signs. An infinite difference (one
    of the two diverged) outweighs all finite ones; one of 0 means that both diverged.
    """
    values = np.asarray(differences, float)
    if not 6 <= values.size <= MAX_EXACT:  # with 5 pairs the smallest possible p is .0625
        return None
    finite = np.abs(values[np.isfinite(values)])
    largest = max(finite.max(initial=0.0), 1e-300)
    values = np.clip(values / largest, -values.size - 1, values.size + 1)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))


def correlation(first: ArrayLike, second: ArrayLike) -> float | None:
    """Return Pearson's correlation of two equally long sequences; None with fewer than 3 pairs or a constant one."""
    x, y = np.asarray(first, float), np.asarray(second, float)
    if x.size < 3 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])
