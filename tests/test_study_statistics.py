"""The statistics of studies: against scipy's own tests, and on thousands of simulated studies."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from llmkit.errors import UserError
from llmkit.study import statistics
from llmkit.study.statistics import BETTER, EQUIVALENT, NONE, UNCLEAR, WORSE

stats = pytest.importorskip("scipy.stats")
STUDIES = 4000
ERROR = 3 * (0.05 * 0.95 / STUDIES) ** 0.5
"""Three standard errors of a rate of 5 % in so many studies."""
INF, NAN = math.inf, math.nan


def simulated(variants: int, seeds: int = 6, rho: float = 0.0, seed: int = 0) -> statistics.Floats:
    """Results of equal variants, (studies, variants, seeds), with correlated pairs."""
    draw = np.random.default_rng(seed)
    shared = draw.standard_normal((STUDIES, 1, seeds))
    own = draw.standard_normal((STUDIES, variants, seeds))
    return np.asarray(rho**0.5 * shared + (1 - rho) ** 0.5 * own)


def claimed(found: statistics.Comparisons, *words: str) -> float:
    """The share of studies with at least one such verdict."""
    return float(np.isin(found.verdict, words).any(-1).mean())


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("variants", [2, 5, 10])
def test_equal_variants_are_rarely_called_different(variants: int, rho: float) -> None:
    x = simulated(variants, rho=rho)
    assert claimed(statistics.compare(x[:, 0], x[:, 1:]), BETTER, WORSE) <= 0.05 + ERROR


@pytest.mark.parametrize("rate", [0.05, 0.3])
@pytest.mark.parametrize("variants", [2, 5])
def test_equal_variants_that_diverge_are_rarely_called_different(variants: int, rate: float) -> None:
    x = simulated(variants, seeds=8)
    x[np.random.default_rng(1).random(x.shape) < rate] = INF
    found = statistics.compare(x[:, 0], x[:, 1:], margin=0.5)
    assert claimed(found, BETTER, WORSE) <= 0.05 + ERROR
    assert not np.isin(found.verdict[found.diverged + found.baseline_diverged > 0], [EQUIVALENT]).any()


def test_a_difference_of_one_and_a_half_standard_deviations_is_found() -> None:
    """With one comparison in 83 % of studies, with more as often as the noncentral t distribution says."""
    x = simulated(2) / 2**0.5  # differences have a standard deviation of 1
    rate = claimed(statistics.compare(x[:, 0], x[:, 1:] - 1.5), BETTER)
    assert rate >= 0.8
    assert rate == pytest.approx(stats.nct.sf(stats.t.isf(0.025, 5), 5, 1.5 * 6**0.5), abs=0.02)
    x = simulated(5) / 2**0.5
    x[:, 1] += 1.5
    power = (statistics.compare(x[:, 0], x[:, 1:]).verdict[:, 0] == WORSE).mean()
    assert power == pytest.approx(stats.nct.sf(stats.t.isf(0.025 / 4, 5), 5, 1.5 * 6**0.5), abs=0.03)


@pytest.mark.parametrize("variants", [2, 5])
def test_differences_of_the_margin_are_rarely_called_equivalent(variants: int) -> None:
    x = simulated(variants) / 2**0.5
    x[:, 1:] += 4.0
    assert claimed(statistics.compare(x[:, 0], x[:, 1:], margin=4.0), EQUIVALENT) <= 0.05 + ERROR
    x[:, 1:] -= 4.0
    assert claimed(statistics.compare(x[:, 0], x[:, 1:], margin=4.0), EQUIVALENT) > 0.9


@pytest.mark.parametrize("seeds", [4, 6, 20])
def test_the_interval_covers_the_truth(seeds: int) -> None:
    x = simulated(2, seeds)
    found = statistics.compare(x[:, 0], x[:, 1:])
    inside = np.abs(found.mean) <= statistics.half_width(found.sd, found.pairs)
    assert inside.mean() == pytest.approx(0.95, abs=ERROR)


@pytest.mark.parametrize(
    ("pairs", "known"), [(3, 3.26), (5, 1.68), (6, 1.43), (8, 1.16), (10, 1.00), (16, 0.75), (20, 0.66)]
)
def test_smallest_difference(pairs: int, known: float) -> None:
    """Simulated figures, and the definition by scipy's noncentral t distribution."""
    assert statistics.smallest_difference(pairs) == pytest.approx(known, abs=0.006)
    for comparisons in (1, 4, 49):
        seen = statistics.smallest_difference(pairs, comparisons)
        bound = stats.t.isf(0.025 / comparisons, pairs - 1)
        assert stats.nct.sf(bound, pairs - 1, seen * pairs**0.5) == pytest.approx(0.8, abs=1e-4)


def test_the_table_of_smallest_differences_in_the_guide() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "comparing.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    seeds, one, ten = (next(row[1:] for row in rows if row[0] == name) for name in SMALLEST)
    assert one == [f"{statistics.smallest_difference(int(pairs)):.2f}" for pairs in seeds]
    assert ten == [f"{statistics.smallest_difference(int(pairs), 10):.2f}" for pairs in seeds]


SMALLEST = ("seeds", "smallest difference seen in 80 % of studies", "the same with ten comparisons")


def test_p_values_are_those_of_scipy() -> None:
    draw = np.random.default_rng(3)
    base, other = draw.normal(4, 0.1, 7), draw.normal(4.1, 0.1, (3, 7))
    found = statistics.compare(base, other, margin=0.2)
    tests = [stats.ttest_rel(row, base) for row in other]
    assert found.p == pytest.approx([test.pvalue for test in tests])
    assert statistics.half_width(found.sd, found.pairs) == pytest.approx(
        [test.confidence_interval().high - (row - base).mean() for test, row in zip(tests, other, strict=True)]
    )
    sides = [
        max(
            stats.ttest_1samp(row - base, -0.2, alternative="greater").pvalue,
            stats.ttest_1samp(row - base, 0.2, alternative="less").pvalue,
        )
        for row in other
    ]
    assert found.p_equivalent == pytest.approx(statistics.holm(sides))
    assert statistics.correlation(base, other[0]) == pytest.approx(stats.pearsonr(base, other[0]).statistic)


def test_missing_results_leave_their_pair_out() -> None:
    base, other = np.array([1.0, 2, 3, 4, 6]), np.array([NAN, 2.5, 3.1, 4.4, 6.2])
    found, whole = statistics.compare(base, other[None]), statistics.compare(base[1:], other[None, 1:])
    assert (found.seeds, found.pairs, found.p) == (whole.seeds, whole.pairs, whole.p)


def test_holm() -> None:
    """The first column of Holm's procedure by hand: 4 x .005, 3 x .01, then no smaller than before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([NAN, 0.04, 0.03]) == pytest.approx([NAN, 0.06, 0.06], nan_ok=True)
    assert statistics.holm([0.8, 0.9]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("values", [[0.1, 0.2, -0.05, 0.3, 0.25, 0.01], [1, 1, -1, 1, 0, 0, 2], [1.0] * 6])
def test_sign_flip_is_the_permutation_test(values: list[float]) -> None:
    known = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flip(values) == pytest.approx(known.pvalue)


def test_sign_flip_with_diverged_runs_and_its_limits() -> None:
    assert statistics.sign_flip([1, 1, 1, 1, 1, INF]) == 2 / 64
    assert statistics.sign_flip([-1, -1, -1, -1, -1, INF]) == 1.0  # the diverged run outweighs the others
    assert statistics.sign_flip([1, 1, 1, -1, INF, -INF]) == (32 + 20) / 64
    assert statistics.sign_flip([0.0] * 6) == 1.0
    assert statistics.sign_flip([1.0] * 20) == pytest.approx(2 / 2**20)
    assert statistics.sign_flip([1.0] * 5) is statistics.sign_flip([1.0] * 21) is None


@pytest.mark.parametrize(("mine", "other", "runs"), [(6, 0, 6), (4, 1, 6), (1, 0, 4), (3, 3, 5), (2, 9, 20)])
def test_how_often_runs_diverge_is_compared_by_fishers_test(mine: int, other: int, runs: int) -> None:
    base, variant = np.zeros(runs), np.zeros(runs)
    base[:other], variant[runs - mine :] = INF, INF
    found = statistics.compare(base, variant[None])
    more = stats.fisher_exact([[mine, runs - mine], [other, runs - other]], "greater" if mine >= other else "less")
    assert found.p == pytest.approx(min(1, 2 * more.pvalue))
    assert found.verdict == (UNCLEAR if found.p > 0.05 else WORSE if mine > other else BETTER)


NOISE = [0.001, -0.002, 0.003, 0.0, -0.001, 0.002]


@pytest.mark.parametrize(
    ("shifts", "lower_is_better", "word"),
    [
        ([-0.1] * 6, True, BETTER),
        ([-0.1] * 6, False, WORSE),
        ([0.1] * 6, True, WORSE),
        ([-0.1] * 5 + [INF], True, UNCLEAR),  # the runs that did not diverge are not all of them
        ([-0.1] * 5 + [-INF], False, WORSE),
        ([0.1] * 5 + [INF], True, WORSE),
        ([0.0] * 5 + [INF], True, UNCLEAR),
        ([INF] * 6, True, WORSE),
        ([0.0] * 6, True, EQUIVALENT),
        ([-0.01] * 6, True, EQUIVALENT),  # visible but smaller than the margin
        ([-0.1] * 4 + [NAN] * 2, True, BETTER),
        ([-0.1] * 3 + [NAN] * 3, True, NONE),
        ([INF] * 3 + [NAN] * 3, True, NONE),
        ([NAN] * 6, True, NONE),
    ],
)
def test_verdicts(shifts: list[float], lower_is_better: bool, word: str) -> None:
    base = np.array([4.0, 4.01, 3.99, 4.02, 4.0, 3.98])
    found = statistics.compare(base, [base + shifts + NOISE], lower_is_better=lower_is_better, margin=0.02)
    assert found.verdict.tolist() == [word]
    swapped = statistics.compare(base + shifts + NOISE, [base], lower_is_better=lower_is_better, margin=0.02)
    assert swapped.verdict.tolist() == [{BETTER: WORSE, WORSE: BETTER}.get(word, word)]


def test_identical_runs_differ_by_exactly_zero() -> None:
    base = np.array([4.0123, 4.0017, 3.9931, 4.0279])
    found = statistics.compare(base, [base])
    assert found.mean.tolist() == [0.0]
    assert found.p.tolist() == [1.0]
    assert found.verdict.tolist() == [UNCLEAR]
    assert statistics.compare(np.tile(base, 2), [np.tile(base, 2)], margin=0.01).verdict.tolist() == [EQUIVALENT]


def test_equal_differences_are_judged_by_their_signs() -> None:
    """No variance is measured, so a t test would claim a p of 0 from four seeds."""
    for pairs, word in ((4, UNCLEAR), (6, WORSE)):
        base = np.arange(pairs) / 7
        found = statistics.compare(base, [base + 0.1])
        assert found.p == 2.0 ** (1 - pairs)
        assert found.verdict == word


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(UserError, match=r"needs the package scipy: pip install 'llmkit\[study\]'"):
        statistics.special()
