"""Figures of a fit of scaling laws, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmkit.run import drawing
from llmkit.study.scaling.surface import Cost, Surface

TITLES = {
    "curves": (
        "Loss by size at each budget",
        "Points: runs. Lines: parabolas. Star: a vertex; hollow: one that is not used, for the reason given above. "
        "Arrows lie outside the axis.",
    ),
    "optimum": (
        "Best size and tokens of a budget",
        "Line and band: the surface and its 90 % bootstrap interval. Stars: vertices of the parabolas with their 90 % "
        "intervals; hollow: not used. Dashed: the power law through those that are used. Dotted: the largest budget "
        "of the runs.",
    ),
    "frontier": (
        "Loss by compute",
        "Points: runs. Line and band: the least loss for a budget by the surface, and its 90 % bootstrap interval; "
        "dotted beyond the runs.",
    ),
    "residuals": (
        "Residuals",
        "Predicted minus measured loss, in percent. Hollow: outliers, which count less; arrows lie outside the axis. A "
        "trend means that the surface has another shape.",
    ),
    "contour": (
        "Contours of the loss",
        "Lines of equal loss by the surface. Points: runs. Thick: the best size and tokens, where they are determined. "
        "Hollow: runs that were held out.",
    ),
    "predictions": (
        "Predicted and measured loss",
        "Runs that the surface was not fitted to, with 90 % intervals for a single run. Thin line: equal.",
    ),
    "multipliers": (
        "Compute multiplier",
        "How many times the compute the first variant needs for the same loss, with 90 % intervals.",
    ),
}


def draw(results: Mapping[str, Any]) -> dict[str, tuple[Any, str, str]]:
    """Draw every figure for which there are results: name of its file -> figure, title, caption. Inside ``style``."""
    figures: dict[str, tuple[Any, str, str]] = {}
    kinds = {
        **{"curves": _curves, "optimum": _optimum, "frontier": _frontier, "residuals": _residuals},
        **{"contour": _contour, "predictions": _predictions},
    }
    for number, (label, variant) in enumerate(results["variants"].items()):
        several = len(results["variants"]) > 1
        for kind, function in kinds.items():
            figure = function(variant)
            if figure is not None:
                title, caption = TITLES[kind]
                name = f"{kind}_{number + 1}" if several else kind
                figures[name] = figure, f"{label}: {title[0].lower()}{title[1:]}" if several else title, caption
    if any(row["value"] is not None for row in results["multipliers"]):
        figures["multipliers"] = _multipliers(results["multipliers"]), *TITLES["multipliers"]
    return figures


def _log(axis: Any, values: Sequence[float], room: float = 1.25, flops: bool = False) -> None:
    drawing.log_axis(axis, min(values) / room, max(values) * room)
    if flops:  # nobody reads 10E for 10^19
        axis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("+", ""))


def _usual(axes: Any, points: Sequence[Mapping[str, Any]], key: str, x: str, factor: float = 1.0) -> None:
    """Limit the y axis to the runs that are no outliers, and mark the others at its edge."""
    values = [factor * p[key] for p in points if p["weight"] > 0.5]
    gap = 0.06 * (max(values) - min(values)) or 0.1
    limits = min(values) - gap, max(values) + gap
    axes.set_ylim(limits)
    for p in points:
        if not limits[0] <= factor * p[key] <= limits[1]:
            look = {"color": drawing.GREY, "markersize": 3}
            drawing.mark_outside(axes, p[x], factor * p[key], limits, **look)


def _shades(count: int) -> list[Any]:
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(count, 1))))


def _curves(variant: Mapping[str, Any]) -> Any:
    parabolas, points = variant["parabolas"]["N"], variant["points"]
    if not parabolas:
        return None
    figure = drawing.canvas(drawing.WIDTH, 3.2)
    axes = figure.subplots()
    sizes = [points[index]["N"] for one in parabolas for index in one["runs"]]
    for colour, one in zip(_shades(len(parabolas)), parabolas, strict=True):
        N = np.array([points[index]["N"] for index in one["runs"]])
        axes.plot(N, [points[index]["loss"] for index in one["runs"]], "o", color=colour, markersize=3)
        grid = np.geomspace(N.min() / 1.1, N.max() * 1.1, 60)
        label = f"{one['budget']:.2g} FLOPs"
        axes.plot(grid, _parabola(one, grid), color=colour, linewidth=0.9, label=label)
        if one["vertex"] is not None and min(sizes) / 1.25 < one["vertex"] < max(sizes) * 1.25:
            face = "white" if one["refused"] else colour
            where = np.array([one["vertex"]])
            axes.plot(where, _parabola(one, where), "*", color=colour, markerfacecolor=face, markersize=9)
    _log(axes.xaxis, sizes)
    _usual(axes, [points[index] for one in parabolas for index in one["runs"]], "loss", "N")
    axes.set(xlabel="parameters N", ylabel="loss")
    axes.grid(axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _parabola(one: Mapping[str, Any], size: Any) -> Any:
    return np.polyval(one["coefficients"], np.log(size) - one["centre"])


def _optimum(variant: Mapping[str, Any]) -> Any:
    optimum, stars = variant["optimum"], variant["parabolas"]
    surface = not variant["reasons"] and "N" in optimum
    drawn = [one for one in stars["N"] if one["vertex"] is not None and one["interval"] is not None]
    if not surface and not drawn:
        return None
    figure = drawing.canvas(drawing.WIDTH, 2.7)
    C = np.array(optimum["C"])
    for axes, key, what in zip(figure.subplots(1, 2), "ND", ("parameters N*", "tokens D*"), strict=True):
        values: list[float] = []
        if surface:
            axes.plot(C, optimum[key]["value"], color=drawing.BLUE)
            axes.fill_between(C, optimum[key]["low"], optimum[key]["high"], color=drawing.BLUE, alpha=0.2, linewidth=0)
            values += [*optimum[key]["low"], *optimum[key]["high"]]
        for one in stars[key]:
            if one["vertex"] is None or one["interval"] is None:
                continue
            look = {"color": drawing.VERMILLION, "markerfacecolor": "white" if one["refused"] else drawing.VERMILLION}
            low, high = (max(one["vertex"] / end, 1 / 30) for end in reversed(one["interval"]))
            axes.plot(
                [one["budget"]] * 2, [one["vertex"] * low, one["vertex"] * high], color=drawing.VERMILLION, lw=0.8
            )
            axes.plot(one["budget"], one["vertex"], "*", markersize=8, **look)
            values.append(one["vertex"])
        if (law := variant["laws"][key]) and not variant["parabola_reasons"]:
            axes.plot(C, law["factor"] * C ** law["exponent"], "--", color=drawing.VERMILLION, linewidth=0.9)
            values += (law["factor"] * C[[0, -1]] ** law["exponent"]).tolist()
        axes.axvline(variant["spans"]["C"][1], color=drawing.GREY, linewidth=0.6, linestyle=":")
        _log(axes.xaxis, optimum["C"], 1.0, flops=True)
        _log(axes.yaxis, values, 1.5)
        axes.grid()
        axes.set(xlabel="FLOPs C", ylabel=what)
    return figure


def _frontier(variant: Mapping[str, Any]) -> Any:
    figure = drawing.canvas(drawing.WIDTH, 2.8)
    axes = figure.subplots()
    points, optimum = variant["points"], variant["optimum"]
    axes.plot([p["C"] for p in points], [p["loss"] for p in points], "o", color=drawing.GREY, markersize=2.5)
    held = variant["held_out"]
    axes.plot([p["C"] for p in held], [p["loss"] for p in held], "o", mec=drawing.VERMILLION, mfc="white", markersize=4)
    if "L" in optimum:
        C, last = np.array(optimum["C"]), variant["spans"]["C"][1]
        values = {name: np.array(line) for name, line in optimum["L"].items()}
        for part, line in ((last * 1.001 >= C, "-"), (last <= C, ":")):
            axes.plot(C[part], values["value"][part], line, color=drawing.BLUE)
        axes.fill_between(C, values["low"], values["high"], color=drawing.BLUE, alpha=0.2, linewidth=0)
    _log(axes.xaxis, [*optimum["C"], *(p["C"] for p in points)], 1.1, flops=True)
    _usual(axes, points, "loss", "C")
    if "L" in optimum:
        axes.set_ylim(bottom=min(optimum["L"]["low"]) * 0.98)
    axes.grid()
    axes.set(xlabel="FLOPs C", ylabel="loss")
    return figure


def _residuals(variant: Mapping[str, Any]) -> Any:
    figure = drawing.canvas(drawing.WIDTH, 2.3)
    points = variant["points"]
    for axes, key, what in zip(
        figure.subplots(1, 3, sharey=True), "NDC", ("parameters N", "tokens D", "FLOPs C"), strict=True
    ):
        for usual in (True, False):
            some = [p for p in points if (p["weight"] > 0.5) == usual]
            face = drawing.BLUE if usual else "white"
            y = [100 * p["residual"] for p in some]
            axes.plot([p[key] for p in some], y, "o", mec=drawing.BLUE, mfc=face, markersize=3, mew=0.6)
        axes.axhline(0, color=drawing.BLACK, linewidth=0.8)
        _log(axes.xaxis, [p[key] for p in points], flops=key == "C")
        _usual(axes, points, "residual", key, 100)
        axes.set_xlabel(what)
        axes.grid(axis="y")
        if key == "N":
            axes.set_ylabel("residual, % of the loss")
    return figure


def _contour(variant: Mapping[str, Any]) -> Any:
    figure = drawing.canvas(drawing.WIDTH, 3.6)
    axes = figure.subplots()
    points, held = variant["points"], variant["held_out"]
    surface, cost = Surface(*variant["surface"]), Cost(*variant["cost"])
    sides = [[p[key] for p in [*points, *held]] for key in "ND"]
    N, D = (np.geomspace(min(side) / 1.5, max(side) * 1.5, 80) for side in sides)
    losses = surface.loss(N[None, :], D[:, None])
    levels = np.quantile(losses, np.linspace(0.03, 0.97, 11))
    lines = axes.contour(N, D, losses, levels=levels, cmap="viridis", linewidths=0.8)
    axes.clabel(lines, fmt="%.3g", fontsize=6)
    axes.plot([p["N"] for p in points], [p["D"] for p in points], "o", color=drawing.BLACK, markersize=2.5)
    axes.plot([p["N"] for p in held], [p["D"] for p in held], "o", mec=drawing.BLACK, mfc="white", markersize=4)
    if not variant["reasons"]:
        C = np.geomspace(cost.k * N[0] ** cost.gamma * D[0], cost.k * N[-1] ** cost.gamma * D[-1], 60)
        axes.plot(*surface.optimum(C, cost), color=drawing.VERMILLION, linewidth=2)
    _log(axes.xaxis, sides[0], 1.5)
    _log(axes.yaxis, sides[1], 1.5)
    axes.set(xlabel="parameters N", ylabel="tokens D")
    return figure


def _predictions(variant: Mapping[str, Any]) -> Any:
    rows = variant["held_out"] or variant["back_test"]
    if not rows:
        return None
    figure = drawing.canvas(drawing.WIDTH, 2.6)
    axes = figure.subplots()
    x, y = [row["loss"] for row in rows], [row["predicted"] for row in rows]
    ends = [[row["predicted"] - row["low"] for row in rows], [row["high"] - row["predicted"] for row in rows]]
    axes.errorbar(x, y, np.abs(ends), fmt="o", color=drawing.BLUE, elinewidth=0.8, markersize=3.5)
    values = [*x, *(row["low"] for row in rows), *(row["high"] for row in rows)]
    axes.axline((min(values), min(values)), slope=1, color=drawing.BLACK, linewidth=0.6)
    axes.grid()
    axes.set(xlabel="measured loss", ylabel="predicted loss")
    return figure


def _multipliers(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure = drawing.canvas(drawing.WIDTH, 2.6)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for name, colour, marker in zip(names, drawing.COLOURS * 9, drawing.MARKERS * 9, strict=False):
        own = [row for row in rows if row["variant"] == name and row["value"] is not None]
        axes.plot([row["C"] for row in own], [row["value"] for row in own], marker=marker, color=colour, label=name)
        bounded = [row for row in own if row["low"] is not None and row["high"] is not None]
        ends = [[row[end] for row in bounded] for end in ("low", "high")]
        axes.fill_between([row["C"] for row in bounded], *ends, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1, color=drawing.BLACK, linewidth=0.8)
    values = [row[key] for row in rows for key in ("value", "low", "high") if row[key] is not None]
    _log(axes.yaxis, [*values, 0.8, 1.25], 1.1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _log(axes.xaxis, [row["C"] for row in rows], flops=True)
    axes.set(xlabel="FLOPs C", ylabel=f"compute of {rows[0]['baseline']}, times")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
