"""What the runs of a study of sizes say, and what they cannot say, as plain data: what the report is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import llmkit
from llmkit.study.scaling import isoflop
from llmkit.study.scaling.isoflop import Parabola, PowerLaw
from llmkit.study.scaling.runs import SIZES, Runs, check
from llmkit.study.scaling.surface import HIGH, LOW, SIX, Cost, Fit, Floats, Surface, conditions, huber, project
from llmkit.study.scaling.uncertainty import bootstrap, noise, predict, profile, quantiles

DECADE = 10.0
"""Sizes, and tokens, have to span so much."""
FACTOR = 2.0
"""An interval that covers this factor does not determine its parameter."""
CONDITION = 1e8
"""Of the Hessian in log parameters: above it, some direction of the surface is not measured."""
NAMES = ("alpha", "beta", "exponent", "E")
"""The parameters that a verdict is given on; A and B are losses of a model with one parameter, and mean little."""
POINTS = 40
"""Of curves."""


def analyse(
    variants: Mapping[str, Runs], name: str, draws: int = 1000, held: Mapping[str, Runs] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return everything that the report says.

    Args:
        variants: the runs of each.
        name: of the study.
        draws: of the bootstrap.
        held: runs of each that are predicted, not fitted. None: none; the fit is then tested by predicting the runs of
            the largest budget from the others.
        facts: further entries of the results.

    Raises:
        UserError: there are too few runs.
    """
    several = len(variants) > 1
    for label, runs in variants.items():
        check(runs, f"variant {label}: " if several else "")
    found = {label: _variant(runs, (held or {}).get(label), draws) for label, runs in variants.items()}
    return {
        "name": name,
        "llmkit": llmkit.__version__,
        **facts,
        "draws": draws,
        "variants": {label: results for label, (results, _, _) in found.items()},
        "multipliers": _multipliers(found) if several else [],
    }


def predictions(runs: Runs, held: Runs, draws: int) -> list[dict[str, Any]]:
    """Return what the runs predict of others, with 90 % intervals: the same as in the report."""
    fit = project(runs.N, runs.D, runs.L)
    return _predictions(fit, bootstrap(runs.N, runs.D, runs.L, fit.surface, draws), held)


class Identified(NamedTuple):
    """A surface, and what the runs determine of it."""

    fit: Fit
    drawn: list[Surface]
    """Of the bootstrap."""
    cost: Cost
    condition: Mapping[str, float]
    parameters: dict[str, Any]
    """Value, standard error and intervals of each."""
    reasons: list[str]
    """Why there is no exponent, a sentence each; none: there is one."""
    groups: list[list[int]]
    """The runs of each budget."""
    parabolas: list[Parabola]
    """The loss by size, one a budget."""


def identify(runs: Runs, draws: int) -> Identified:
    """Fit a surface and parabolas to the runs, and find out what they determine."""
    fit = project(runs.N, runs.D, runs.L)
    drawn = bootstrap(runs.N, runs.D, runs.L, fit.surface, draws)
    cost = Cost.counted(runs.N, runs.D, runs.C) if runs.counted else SIX
    conditioned = conditions(fit.surface, runs.N, runs.D)
    parameters = _parameters(runs, fit, drawn, cost)
    reasons = _reasons(runs, fit, drawn, parameters, conditioned)
    groups = isoflop.budgets(runs.C, runs.budget)
    return Identified(fit, drawn, cost, conditioned, parameters, reasons, groups, _parabolas(runs, groups, runs.N))


def _variant(runs: Runs, held: Runs | None, draws: int) -> tuple[dict[str, Any], Fit, list[Surface]]:
    fit, drawn, cost, conditioned, parameters, reasons, groups, by_size = identify(runs, draws)
    parabolas = {"N": by_size, "D": _parabolas(runs, groups, runs.D)}
    laws = {axis: isoflop.power_law(found) for axis, found in parabolas.items()}
    biased = None if reasons else isoflop.bias(fit.surface, groups, runs.C, runs.N, cost)
    for name, one in parameters.items():  # what the runs do not determine is in no file
        if not one["determined"] or (reasons and name != "E"):
            one["value"] = None
    against = _parabola_reasons(parabolas["N"], laws["N"])
    everything = np.concatenate([runs.C, held.C]) if held else runs.C
    grid = np.geomspace(everything.min(), 10 * everything.max(), POINTS)
    results: dict[str, Any] = {
        "runs": len(runs),
        "spans": {key: [float(v.min()), float(v.max())] for key, v in (("N", runs.N), ("D", runs.D), ("C", runs.C))},
        "counted": runs.counted,
        "cost": list(cost),
        "noise": float(np.sqrt(np.mean(noise(fit) ** 2))),
        "outliers": int((fit.weights < 0.5).sum()),
        "condition": conditioned,
        "parameters": parameters,
        "coefficients": {key: float(getattr(fit.surface, key)) for key in ("A", "B")},
        "reasons": reasons,
        "surface": list(fit.surface),
        "parabolas": {axis: [one._asdict() for one in found] for axis, found in parabolas.items()},
        "laws": {axis: law and law._asdict() for axis, law in laws.items()},
        "parabola_reasons": against,
        "all_vertices": {axis: None if against else _every(found) for axis, found in parabolas.items()},
        "bias": biased and {**biased._asdict(), "at": _bias_at(biased, fit.surface, cost, float(runs.C.max()))},
        "conventions": _conventions(runs, groups, bool(reasons)),
        "optimum": _optimum(fit.surface, drawn, cost, grid),
        "points": _points(runs, fit),
        "held_out": _predictions(fit, drawn, held) if held else [],
        "back_test": [] if held else _back_test(runs, groups, draws),
    }
    return results, fit, drawn


def _parameters(runs: Runs, fit: Fit, drawn: Sequence[Surface], cost: Cost) -> dict[str, Any]:
    """Return value, standard error and intervals of each parameter, and whether the runs determine it."""
    found: dict[str, Any] = {}
    for name in NAMES:
        interval = profile(runs.N, runs.D, runs.L, fit, name)
        value, values = float(getattr(fit.surface, name)), np.array([getattr(one, name) for one in drawn])
        if name == "exponent":  # of counted FLOPs
            value, *ends = (_with(cost, x) for x in (value, *interval))
            interval, values = (ends[0], ends[1]), np.array([cost.exponent(one.alpha, one.beta) for one in drawn])
        percentiles = quantiles(values)
        low, high = min(interval[0], percentiles[0]), max(interval[1], percentiles[1])
        found[name] = {
            "value": value,
            "error": float(values.std()),
            "bootstrap": list(percentiles),
            "profile": [end if math.isfinite(end) else None for end in interval],
            "determined": low > 0 and high < FACTOR * low,
        }
    return found


def _with(cost: Cost, x: float) -> float:
    """Return the exponent for a cost, where that for 6 N D is ``x``."""
    return x / (1 - x + cost.gamma * x)


def _reasons(
    runs: Runs, fit: Fit, drawn: Sequence[Surface], parameters: Mapping[str, Any], conditioned: Mapping[str, float]
) -> list[str]:
    """Return why the runs do not determine an exponent, a sentence each; none: they do."""
    surface, found = fit.surface, []
    for what, values in (("sizes span", runs.N), ("tokens span", runs.D)):
        if (span := float(values.max() / values.min())) < DECADE * 0.999:
            found.append(f"The {what} a factor of {span:.2g}: under a decade, other powers fit as well.")
    if (condition := conditioned["five_log"]) > CONDITION or not math.isfinite(condition):
        found.append(
            f"The condition of the Hessian in log parameters is {condition:.1g}, above {CONDITION:.0g}: parameters can "
            "make up for each other. Vary sizes and tokens independently."
        )
    zero = sum(one.E <= 0 for one in drawn) / len(drawn)
    if surface.E <= 0:
        found.append(
            "E is at 0: the losses do not level off within these runs, and exponents depend on where they will."
        )
    elif zero > 0.05:
        found.append(
            f"E is at 0 in {zero:.0%} of the bootstrap's draws: exponents depend on where the losses level off."
        )
    for key, what in (("A", "size"), ("B", "number of tokens")):
        if getattr(surface, key) <= 0:
            found.append(f"{key} is at 0: the loss does not depend on the {what}.")
    for name in ("alpha", "beta"):
        if not LOW * 1.01 < getattr(surface, name) < HIGH * 0.99:
            found.append(f"{name} is at the end of the range that was searched.")
    for name in NAMES:
        if not parameters[name]["determined"]:
            found.append(
                f"The 90 % interval of {_title(name)} covers a factor of {FACTOR:g} or more: {_ends(parameters[name])}."
            )
    return found


def _title(name: str) -> str:
    return "the exponent of N*" if name == "exponent" else name


def _ends(parameter: Mapping[str, Any]) -> str:
    (a, b), (c, d) = parameter["bootstrap"], parameter["profile"]
    return f"{min(a, c):.3g} to {'any larger value' if d is None else f'{max(b, d):.3g}'}"


def _parabolas(runs: Runs, groups: Sequence[list[int]], size: Floats) -> list[Parabola]:
    values = runs.C if runs.budget is None else runs.budget
    budget = [float(np.exp(np.log(values[group]).mean())) for group in groups]
    return [isoflop.parabola(C, group, size, runs.L) for C, group in zip(budget, groups, strict=True)]


def _every(parabolas: Sequence[Parabola]) -> dict[str, Any] | None:
    """Return the power law through all vertices, as others publish it."""
    law = isoflop.power_law(one._replace(refused="") for one in parabolas if one.vertex is not None)
    return law and law._asdict()


def _parabola_reasons(parabolas: Sequence[Parabola], law: PowerLaw | None) -> list[str]:
    used = [one.budget for one in parabolas if not one.refused]
    if law is None:
        return [f"{len(used)} of {len(parabolas)} budgets have a vertex; a power law needs {isoflop.VERTICES}."]
    found = []
    if (span := max(used) / min(used)) < DECADE * 0.999:
        found.append(f"The budgets whose vertices are used span a factor of {span:.2g}: under a decade.")
    if law.interval[0] <= 0 or law.interval[1] >= FACTOR * law.interval[0]:
        ends = " to ".join(f"{end:.3g}" for end in law.interval)
        found.append(f"The 90 % interval of the exponent covers a factor of {FACTOR:g} or more: {ends}.")
    return found


def _bias_at(law: PowerLaw, surface: Surface, cost: Cost, largest: float) -> list[dict[str, float]]:
    """Return how far the parabolas' sizes are from the surface's own, in tokens, at the largest budget and beyond."""
    rows = []
    for C in (largest, 10 * largest, 100 * largest):
        size, tokens = surface.optimum(C, cost)
        theirs = C / cost.k / float(law.at(np.array(C))) ** cost.gamma
        rows.append({"C": C, "tokens": theirs / float(tokens) - 1, "size": float(law.at(np.array(C)) / size) - 1})
    return rows


def _conventions(runs: Runs, groups: Sequence[list[int]], refused: bool) -> list[dict[str, Any]]:
    """Return the exponents by each convention of counting parameters and FLOPs, and by each method.

    Without exponents are the surfaces of all conventions if those of N were ``refused``, and of others whose sizes span
    less than a decade or whose fit is degenerate.
    """
    sizes = {"N": runs.N, **{key: runs.sizes[key] for key in SIZES[1:] if key in runs.sizes}}
    known = {name for name, values in sizes.items() if name != "N" and np.array_equal(values, runs.N)}
    sizes = {name: values for name, values in sizes.items() if not (name == "N" and known)}
    if runs.counted:
        sizes["C / 6D"] = runs.C / 6 / runs.D
    rows = []
    for name, size in sizes.items():
        fits = {"variable projection": project(size, runs.D, runs.L), "Huber": huber(size, runs.D, runs.L, refine=6)}
        costs = {"6ND": 6 * size * runs.D, **({"counted": runs.C} if runs.counted and name != "C / 6D" else {})}
        for how, C in costs.items():
            cost = SIX if how == "6ND" else Cost.counted(size, runs.D, C)
            own = groups if how == "counted" or not runs.counted else isoflop.budgets(C, runs.budget)
            shown = Runs(size, runs.D, runs.L, C, runs.counted, {}, runs.budget, runs.places)
            curves = _parabolas(shown, own, size)
            law = isoflop.power_law(curves)
            for method, fit in fits.items():
                E, A, B, alpha, beta = fit.surface
                condition = conditions(fit.surface, size, runs.D)["five_log"]
                vague = refused or size.max() < DECADE * size.min() or min(E, A, B) <= 0 or condition > CONDITION
                numbers = (
                    {} if vague else {"exponent": cost.exponent(alpha, beta), "alpha": alpha, "beta": beta, "E": E}
                )
                rows.append({"N": name, "flops": how, "method": method, **numbers})
            if law is not None and not _parabola_reasons(curves, law):
                rows.append({"N": name, "flops": how, "method": "parabolas", "exponent": law.exponent})
    return rows


def _optimum(surface: Surface, drawn: Sequence[Surface], cost: Cost, grid: Floats) -> dict[str, Any]:
    """Return the best size, tokens and loss of each budget, with 90 % bands."""
    found: dict[str, Any] = {"C": grid.tolist()}
    if min(surface.A, surface.B) <= 0:
        return found
    usable = [one for one in drawn if min(one.A, one.B) > 0]
    for index, key in enumerate("NDL"):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            curves = [(*one.optimum(grid, cost), one.frontier(grid, cost))[index] for one in (surface, *usable)]
        low, high = np.quantile(np.nan_to_num(curves[1:] or curves), [0.05, 0.95], axis=0)
        found[key] = {"value": curves[0].tolist(), "low": low.tolist(), "high": high.tolist()}
    return found


def _points(runs: Runs, fit: Fit) -> list[dict[str, Any]]:
    columns = (runs.N, runs.D, runs.C, runs.L, runs.L * (1 + fit.residuals), fit.residuals, fit.weights)
    keys = ("N", "D", "C", "loss", "predicted", "residual", "weight")
    rows = zip(*(values.tolist() for values in columns), strict=True)
    found = [
        {"place": place, **dict(zip(keys, row, strict=True))} for place, row in zip(runs.places, rows, strict=True)
    ]
    if runs.bits is not None:
        return [{**point, "bits_per_byte": float(bits)} for point, bits in zip(found, runs.bits, strict=True)]
    return found


def _predictions(fit: Fit, drawn: Sequence[Surface], held: Runs) -> list[dict[str, Any]]:
    values, low, high = predict(fit, drawn, held.N, held.D)
    columns = (held.N, held.D, held.C, held.L, values, low, high)
    keys = ("N", "D", "C", "loss", "predicted", "low", "high")
    return [dict(zip(keys, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def _back_test(runs: Runs, groups: Sequence[list[int]], draws: int) -> list[dict[str, Any]]:
    """Return the runs of the largest budget (or the tenth with the most FLOPs) as the others predict them."""
    count = max(1, len(runs) // 10)
    largest = groups[-1] if groups and len(groups) > 3 else np.argsort(runs.C, kind="stable")[-count:].tolist()
    kept = np.setdiff1d(np.arange(len(runs)), largest)
    rest = runs.take(kept)
    if len(rest) < 8 or min(isoflop.distinct(rest.N), isoflop.distinct(rest.D)) < 3:
        return []
    fit = project(rest.N, rest.D, rest.L)
    drawn = bootstrap(rest.N, rest.D, rest.L, fit.surface, max(20, draws // 4))
    return _predictions(fit, drawn, runs.take(largest))


def _multipliers(found: Mapping[str, tuple[dict[str, Any], Fit, list[Surface]]]) -> list[dict[str, Any]]:
    """Return how much more compute the first variant needs for the loss of each other one, at several budgets.

    m of a variant at C: its least loss for C is that of the first one for m C. Above 1 the variant is the better one.
    """
    (first, (base, base_fit, base_drawn)), *others = found.items()
    rows = []
    for label, (results, fit, drawn) in others:
        spans = [base["spans"]["C"], results["spans"]["C"]]
        low, high = max(s[0] for s in spans), min(s[1] for s in spans)
        if low >= high:
            continue
        own, theirs = Cost(*results["cost"]), Cost(*base["cost"])
        for C in np.geomspace(low, high, 3):
            pairs = zip((fit.surface, *drawn), (base_fit.surface, *base_drawn), strict=True)
            value, *values = (_multiplier(one, own, other, theirs, float(C)) for one, other in pairs)
            known = [value for value in values if not math.isnan(value)]
            ends = np.quantile(known, [0.05, 0.95], method="nearest") if known else (math.nan, math.nan)
            numbers = dict(zip(("value", "low", "high"), map(_known, (value, *ends)), strict=True))
            rows.append({"variant": label, "baseline": first, "C": float(C), **numbers})
    return rows


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _multiplier(one: Surface, own: Cost, other: Surface, cost: Cost, C: float) -> float:
    """Return the multiple of ``C`` at which the ``other`` surface is as low as this one at C; infinite: never."""
    if min(one.A, one.B, other.A, other.B) <= 0:
        return math.nan
    loss = float(one.frontier(C, own))
    if loss <= other.E:
        return math.inf
    # Along the optimum A N^-alpha and B D^-beta keep their ratio, so that loss - E is a power of C.
    power = other.alpha * other.beta / (other.alpha + cost.gamma * other.beta)
    return float(((other.frontier(C, cost) - other.E) / (loss - other.E)) ** (1 / power))
