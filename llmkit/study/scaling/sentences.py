"""What a report on scaling laws says in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.study.scaling.isoflop import SIZES, WIDE
from llmkit.study.tables import MINUS, size

TITLES = {"alpha": "alpha", "beta": "beta", "exponent": "exponent of N*", "E": "E"}
CONVENTIONS = (
    "The exponent depends on what is counted. Embedding tables are a large share of a small model and a small one of a "
    "large model, so the same runs have another exponent with them; FLOPs that are counted contain attention and the "
    "output layer, which 6ND does not. Compare exponents of one convention only."
)
MULTIPLIERS = (
    "A variant with the multiplier 2 reaches with a budget what the first variant needs twice the budget for, both at "
    "their best size. Intervals are from independent bootstraps of both."
)
TRUNK = (
    "The runs of a size share one trunk at a constant learning rate, and each decays from it. What a trunk's initial "
    "weights and data order add to the loss is therefore common to them; the intervals take runs for independent."
)


def shown(variant: Mapping[str, Any], name: str) -> float | None:
    """Return the value of a parameter; None: the runs do not determine it."""
    value = variant["parameters"][name]["value"]
    return None if value is None else float(value)


def interval(ends: Sequence[float | None]) -> str:
    """Return ``0.34 to 0.36``; an end that was not found is open."""
    return " to ".join("no end" if end is None else f"{end:.3g}" for end in ends)


def times(value: float | None) -> str:
    """Return a multiplier; None: no budget is enough."""
    return "not reached" if value is None else f"{value:.3g}×"


def span(low: float | None, high: float | None) -> str:
    """Return the interval of a multiplier."""
    return f"{times(low)} to {times(high)}"


def verdict(variant: Mapping[str, Any]) -> str:
    """Return the exponents with their intervals, or that there are none."""
    if variant["reasons"]:
        return "No exponent: these runs do not determine one."
    one = variant["parameters"]["exponent"]
    low, high = one["bootstrap"]
    gamma = variant["cost"][1]
    return (
        f"The best size grows as C^{one['value']:.3f} (90 % interval {low:.3f} to {high:.3f}), the best number of "
        f"tokens as C^{1 - gamma * one['value']:.3f}."
    )


def equation(variant: Mapping[str, Any]) -> str:
    """Return the surface as a formula."""
    E, A, B, alpha, beta = variant["surface"]
    return f"L = {E:.4g} + {A:.4g} / N^{alpha:.4f} + {B:.4g} / D^{beta:.4f}"


def facts(variant: Mapping[str, Any]) -> list[str]:
    """Return what was fitted, and how well the question was posed."""
    spans = {key: f"{size(low)} to {size(high)}" for key, (low, high) in variant["spans"].items() if key != "C"}
    low, high = variant["spans"]["C"]
    many = variant["outliers"] > 1
    outliers = f"; {variant['outliers']} outlier{'s count' if many else ' counts'} less" if variant["outliers"] else ""
    text = (
        f"{variant['runs']} runs: {spans['N']} parameters, {spans['D']} tokens, {low:.2g} to {high:.2g} FLOPs. "
        f"A run differs from the surface by {100 * variant['noise']:.2g} % (standard deviation{outliers})."
    )
    if not variant["reasons"]:
        text = f"{equation(variant)}. {text}"
    five, log, projected = (variant["condition"][key] for key in ("five", "five_log", "projected"))
    return [
        text,
        f"Condition of the Hessian: {five:.1e} for the five parameters, {log:.1e} for their logarithms, "
        f"{projected:.2g} for the two exponents that variable projection searches.",
    ]


def parabolas(variant: Mapping[str, Any]) -> str:
    """Return what the parabolas say, and the bias they have on this grid."""
    law, every = variant["laws"]["N"], variant["all_vertices"]["N"]
    if variant["parabola_reasons"]:
        text = f"No exponent from parabolas. {' '.join(variant['parabola_reasons'])}"
    else:
        low, high = law["interval"]
        text = f"N* grows as C^{law['exponent']:.3f} (90 % interval {low:.3f} to {high:.3f})"
        if tokens := variant["laws"]["D"]:
            text += f", D* as C^{tokens['exponent']:.3f}"
        text += "."
        if every and every != law:
            text += f" With all vertices, refused ones too, N* would grow as C^{every['exponent']:.3f}."
    if bias := variant["bias"]:
        here, _, far = bias["at"]
        own = variant["parameters"]["exponent"]["value"]
        text += (
            f" Bias of this method on this grid: on the surface above, without noise, the parabolas would find "
            f"C^{bias['exponent']:.3f} instead of C^{own:.3f}, and {_percent(here['tokens'])} tokens at the largest "
            f"budget, {_percent(far['tokens'])} at a hundred times that."
        )
    return text


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", MINUS)


def tested(variant: Mapping[str, Any]) -> str:
    """Return how predictions compare with what was measured."""
    rows = variant["held_out"] or variant["back_test"]
    inside = sum(row["low"] <= row["loss"] <= row["high"] for row in rows)
    worst = max((row["predicted"] / row["loss"] - 1 for row in rows), key=abs)
    mean = sum(row["predicted"] / row["loss"] - 1 for row in rows) / len(rows)
    what = "that were held out" if variant["held_out"] else "with the most FLOPs, predicted by a fit without them"
    count = f"Of {len(rows)} runs" if len(rows) > 1 else "Of 1 run"
    return (
        f"{count} {what}: {inside} in the 90 % interval. Predictions are off by {_percent(mean)} on average, "
        f"{_percent(worst)} at most."
    )


def methods(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs that say what was done."""
    source = f" to {results['source']}" if results.get("source") else ""
    return [
        f"The surface L = E + A / N^alpha + B / D^beta was fitted{source} by variable projection: alpha and beta are "
        "searched, and for each pair E, A and B are the non-negative least squares solution. Residuals are relative to "
        "the loss; those beyond 1.345 robust standard deviations count less (Huber's M-estimator). Standard errors and "
        f"intervals are from {results['draws']:,} bootstrap samples of the runs; profile likelihood intervals hold one "
        "parameter and fit the others again. The Huber fit minimizes the summed Huber loss (0.001) of log residuals "
        "over all five parameters, from the best of 4,500 starts. Intervals of predictions contain both the doubt "
        "about the surface and the noise of a run.",
        f"A parabola is fitted to the loss by log size at each budget. Its vertex is refused with fewer than {SIZES} "
        "sizes, with fewer than two sizes on either side, where the curve has no minimum, and where its 90 % interval "
        f"(Fieller) covers more than a factor of {WIDE:g}. The exponent's interval is a t interval of the line through "
        "the vertices.",
        *([TRUNK] if results.get("schedule") == "trunk" else []),
        "No exponent is given where sizes or tokens span less than a decade, the Hessian in log parameters has a "
        "condition above 1e8, E is at 0, or a 90 % interval covers a factor of 2. "
        f"Written by llmkit {results['llmkit']}.",
    ]


def summary(results: Mapping[str, Any]) -> str:
    """Return the result in a few lines, for a terminal."""
    lines = []
    for label, variant in results["variants"].items():
        first, *_ = facts(variant)
        lines += [f"{label if len(results['variants']) > 1 else results['name']}: {verdict(variant)}"]
        lines += [f"  - {reason}" for reason in variant["reasons"]]
        lines += [f"  {first}"]
        if variant["parabolas"]["N"]:
            lines += [f"  Parabolas: {parabolas(variant)}"]
        if variant["held_out"] or variant["back_test"]:
            lines += [f"  {tested(variant)}"]
    for row in results["multipliers"]:
        lines.append(
            f"{row['variant']} at {row['C']:.2g} FLOPs: {row['baseline']} needs {times(row['value'])} the compute, "
            f"90 % interval {span(row['low'], row['high'])}"
        )
    return "\n".join(lines)
