"""Figures of a search, from its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmkit.run import drawing

Results = Mapping[str, Any]
TITLES = {
    "progress": (
        "Progress",
        "Points: trials. Line: the best so far. Star: the best. Cross: without a result. Arrow: outside the axis.",
    ),
    "slices": (
        "Each key",
        "Trials by the value of one key; the others vary too. Darker: later. Star: the best. Cross: "
        "without a result. Arrow: outside the axis.",
    ),
    "importance": (
        "Importance",
        "Share of each key in what tells the best tenth of the trials from all (PED-ANOVA). From few trials it "
        "is rough, and it holds for this space only.",
    ),
}


def draw(results: Results) -> dict[str, tuple[Any, str, str]]:
    """Draw every figure for which there are results: name of its file -> figure, title, caption. Inside ``style``."""
    if results["best"] is None:
        return {}
    figures = {"progress": _progress(results), "slices": _slices(results), "importance": _importance(results)}
    return {name: (figure, *TITLES[name]) for name, figure in figures.items() if figure is not None}


def _limits(results: Results) -> tuple[float, float]:
    """The range of the metric: all trials but those far on the worse side of the median."""
    values = [row["value"] for row in results["trials"] if row["value"] is not None]
    best = min(values) if results["better"] == "min" else max(values)
    reach = drawing.FAR * abs(float(np.median(values)) - best)
    near = [value for value in values if abs(value - best) <= reach] or values
    gap = 0.06 * (max(near) - min(near)) or 0.05
    return min(near) - gap, max(near) + gap


def _mark(
    axes: Any, x: float, row: Mapping[str, Any], results: Results, limits: tuple[float, float], **look: Any
) -> None:
    value = row["value"]
    if value is None:
        edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        worst = 1.0 if results["better"] == "min" else 0.0
        axes.plot(x, worst, "x", **{**look, "color": drawing.VERMILLION}, **edge)
    elif row["trial"] == results["best"]:
        axes.plot(x, value, "*", markersize=9, color=drawing.VERMILLION, zorder=4)
    elif limits[0] <= value <= limits[1]:
        axes.plot(x, value, "o", **look)
    else:
        drawing.mark_outside(axes, x, value, limits, **look)


def _progress(results: Results) -> Any:
    figure = drawing.canvas(drawing.WIDTH, 2.6)
    axes, limits = figure.subplots(), _limits(results)
    rows = results["trials"]
    best = np.minimum.accumulate if results["better"] == "min" else np.maximum.accumulate
    worst = np.inf if results["better"] == "min" else -np.inf
    values = np.array([worst if row["value"] is None else row["value"] for row in rows])
    line = best(values)
    finite = np.isfinite(line)
    numbers = np.array([row["trial"] for row in rows])
    axes.step(numbers[finite], line[finite], where="post", color=drawing.BLACK)
    for row in rows:
        _mark(axes, row["trial"], row, results, limits, color=drawing.BLUE)
    axes.set(xlabel="trial", ylabel=results["metric"], ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    return figure


def _slices(results: Results) -> Any:
    space, limits = results["space"], _limits(results)
    figure, panels = drawing.panel_grid(len(space), 1.9, 3, sharey=True)
    rows = results["trials"]
    for axes, (key, kind) in zip(panels, space.items(), strict=True):
        found = [row["values"][key] for row in rows]
        if kind["choices"]:
            places = [kind["choices"].index(value) for value in found]
            labels = [value if isinstance(value, str) else json.dumps(value) for value in kind["choices"]]
            axes.set_xticks(range(len(labels)), map(_short, labels))
            axes.set_xlim(-0.5, len(kind["choices"]) - 0.5)
        else:
            places = found
            low, high = kind["ends"]
            if kind["log"]:
                drawing.log_axis(axes.xaxis, low / (high / low) ** 0.05, high * (high / low) ** 0.05)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            else:
                axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        for number, (place, row) in enumerate(zip(places, rows, strict=True)):
            shade = 0.25 + 0.75 * (number + 1) / len(rows)
            _mark(axes, place, row, results, limits, color=drawing.BLUE, alpha=shade)
        axes.set(xlabel=_short(key, 34), ylim=limits)
        axes.grid(axis="y")
    figure.supylabel(results["metric"], fontsize=8)
    return figure


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[1 - most :]}"


def _importance(results: Results) -> Any:
    shares = results["importance"]
    if not shares:
        return None
    order = sorted(shares, key=lambda key: shares[key])
    figure = drawing.canvas(drawing.WIDTH, 0.27 * len(order) + 0.65)
    axes = figure.subplots()
    axes.barh(range(len(order)), [shares[key] for key in order], color=drawing.BLUE, height=0.6)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="importance", xlim=(0, 1))
    axes.tick_params(axis="y", length=0)
    return figure
