"""The verdicts of a study, one for each variant and setting, from its results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.study import statistics
from llmkit.study.statistics import MIN_SEEDS

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """The metric of one variant in one setting at the last step."""

    values: dict[int, float]
    """By seed; an infinite value is a diverged run."""

    @property
    def finished(self) -> list[float]:
        return [value for value in self.values.values() if math.isfinite(value)]

    @property
    def diverged(self) -> int:
        return len(self.values) - len(self.finished)

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.finished)) if self.finished else None

    @property
    def sd(self) -> float | None:
        return float(np.std(self.finished, ddof=1)) if len(self.finished) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """What a study says about one variant. Differences are variant minus baseline, over the pairs that are finite."""

    variant: str
    setting: str
    word: str
    """better, worse, equivalent, not distinguishable or no verdict."""
    sample: Sample
    differences: dict[int, float]
    """By seed."""
    seeds: int
    """Seeds with a result of both, diverged runs included."""
    pairs: int
    """Seeds on which both are finite."""
    difference: float | None
    sd: float | None
    """Standard deviation of the differences."""
    half: float | None
    """Half the width of the 95 % interval of ``difference``."""
    half_all: float | None
    """The same for an interval that holds for all comparisons together."""
    p: float | None
    """Adjusted by Holm's method, as are all p-values but ``p_sign_flip``."""
    p_equivalent: float | None
    p_sign_flip: float | None
    correlation: float | None
    visible: float | None
    """The smallest difference that would have been seen with power 0.8."""
    caveats: tuple[str, ...]
    """What restricts the verdict, a clause each."""


def settings(results: Results) -> list[str]:
    """Return the settings with results, the one that counts first."""
    found = {setting for variant in results["variants"].values() for setting, runs in variant["runs"].items() if runs}
    order = ["tuned", "base", *found]
    return sorted(found, key=order.index) or ["base"]


def sample(results: Results, variant: str, setting: str) -> Sample:
    """Return what a variant reached in a setting, by seed."""
    worst = math.inf if results["better"] == "min" else -math.inf
    runs = results["variants"][variant]["runs"].get(setting, {})
    values = {seed: runs[str(seed)] for seed in results["seeds"] if str(seed) in runs}
    return Sample({s: worst if v is None or not math.isfinite(v) else float(v) for s, v in values.items()})


def costs(results: Results, variant: str, setting: str) -> dict[str, float]:
    """Return what a variant costs in a setting."""
    one = results["variants"][variant]
    found: dict[str, float] = (one["also"] if setting == results.get("also") else one)["costs"]
    return found


def of(results: Results, setting: str) -> list[Verdict]:
    """Compare every other variant with the baseline, in the order of the results."""
    names = [name for name in results["variants"] if name != results["baseline"]]
    samples = {name: sample(results, name, setting) for name in results["variants"]}
    rows = {name: [one.values.get(seed, math.nan) for seed in results["seeds"]] for name, one in samples.items()}
    base = np.array(rows[results["baseline"]], float)
    others = np.array([rows[name] for name in names], float).reshape(len(names), len(base))
    found = statistics.compare(base, others, lower_is_better=results["better"] == "min", margin=results["margin"])
    comparisons = max(1, int(np.isfinite(found.p).sum()))
    verdicts = []
    for index, (name, other) in enumerate(zip(names, others, strict=True)):
        with np.errstate(invalid="ignore"):
            gaps = np.where(np.isinf(base) & np.isinf(other), 0.0, other - base)
        finished = np.isfinite(base) & np.isfinite(other)
        pairs, sd = int(found.pairs[index]), _number(found.sd[index])
        complete = pairs >= MIN_SEEDS and pairs == found.seeds[index]
        verdicts.append(
            Verdict(
                variant=name,
                setting=setting,
                word=str(found.verdict[index]),
                sample=samples[name],
                differences={seed: float(gaps[i]) for i, seed in enumerate(results["seeds"]) if finished[i]},
                seeds=int(found.seeds[index]),
                pairs=pairs,
                difference=_number(found.mean[index]),
                sd=sd,
                half=None if sd is None else float(statistics.half_width(sd, pairs)),
                half_all=None if sd is None else float(statistics.half_width(sd, pairs, comparisons)),
                p=_number(found.p_holm[index]),
                p_equivalent=_number(found.p_equivalent[index]),
                p_sign_flip=statistics.sign_flip(gaps[~np.isnan(gaps)]),
                correlation=statistics.correlation(base[finished], other[finished]),
                visible=sd * statistics.smallest_difference(pairs, comparisons) if sd and complete else None,
                caveats=tuple(_caveats(results, setting, name, found, index)),
            )
        )
    return verdicts


def everything(results: Results) -> dict[str, list[Verdict]]:
    """Return the verdicts of each setting, the one that counts first; a win or loss by one cost alone is marked."""
    found = {setting: of(results, setting) for setting in settings(results)}
    other = {row.variant: row.word for row in found.get(results.get("also") or "", [])}
    for setting in [setting for setting in found if setting != results.get("also")]:
        for index, row in enumerate(found[setting]):
            if row.word in (statistics.BETTER, statistics.WORSE) and other.get(row.variant, row.word) != row.word:
                caveat = "depends on what is made equal"
                found[setting][index] = dataclasses.replace(row, caveats=(*row.caveats, caveat))
    return found


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _caveats(results: Results, setting: str, name: str, found: statistics.Comparisons, index: int) -> list[str]:
    seeds = int(found.seeds[index])
    lines = []
    for count, whose in ((found.diverged[index], ""), (found.baseline_diverged[index], " of the baseline")):
        if count:
            lines.append(f"{count} of {seeds} runs{whose} diverged")
    if MIN_SEEDS <= seeds < len(results["seeds"]):
        lines.append(f"{seeds} of {len(results['seeds'])} seeds")
    if setting != "base" and (tuned := results["tuned"]):
        for variant, whose in ((name, ""), (results["baseline"], " of the baseline")):
            if results["variants"][variant]["at_edge"]:
                lines.append(f"{short(tuned['key'])}{whose} at the edge")
    return lines


def short(key: str) -> str:
    """Return the name of a key in sentences."""
    return {"lr": "learning rate", "weight_decay": "weight decay"}.get(key.rsplit(".", 1)[-1], key)


def sentence(verdict: Verdict, margin: float | None, decimals: int) -> str:
    """Return the verdict in words, with what restricts it."""
    text = verdict.word
    if verdict.word == statistics.EQUIVALENT:
        seen = verdict.p is not None and verdict.p <= statistics.LEVEL
        text += f" within ±{margin:g}" + (" (a smaller difference is visible)" if seen else "")
    elif verdict.word == statistics.NONE:
        text += f" ({verdict.seeds} common seed{'' if verdict.seeds == 1 else 's'}, at least {MIN_SEEDS} are needed)"
    elif verdict.word == statistics.UNCLEAR and verdict.visible is not None:
        text += f" (would have seen at least {verdict.visible:.{decimals}f})"
    elif (
        verdict.word == statistics.UNCLEAR and verdict.pairs == verdict.seeds and not any(verdict.differences.values())
    ):
        text += " (all pairs are exactly equal)"
    return "; ".join([text, *verdict.caveats])


def window(results: Results, name: str) -> tuple[float, float] | None:
    """Return the smallest and largest tuned value around the best one that lose less than the margin (or 1 %) to it."""
    means = tuning_means(results, name)
    sign = 1 if results["better"] == "min" else -1
    usable = [(sign * mean, index) for index, (_, mean) in enumerate(means) if mean is not None]
    if not usable:
        return None
    best, low = min(usable)
    allowed = results["margin"] if results["margin"] is not None else 0.01 * abs(best)
    good = {index for value, index in usable if value <= best + allowed}
    high = low
    while low - 1 in good:
        low -= 1
    while high + 1 in good:
        high += 1
    return means[low][0], means[high][0]


def tuning_means(results: Results, name: str) -> list[tuple[float, float | None]]:
    """Return (value, mean result) of a variant's tuning; None where a run diverged."""
    points = results["variants"][name]["tuning"] or []
    return [
        (
            point["value"],
            float(np.mean(point["results"])) if point["results"] and None not in point["results"] else None,
        )
        for point in points
    ]


def decimals(verdicts: Iterable[Verdict]) -> int:
    """Return the decimals for values of the metric: two digits of the median standard deviation, 4 without one."""
    spread = [verdict.sd for verdict in verdicts if verdict.sd]
    return min(6, max(1, 1 - math.floor(math.log10(float(np.median(spread)))))) if spread else 4
