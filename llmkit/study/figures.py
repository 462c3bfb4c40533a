"""Figures of a study, made for print: colour-blind safe (Okabe and Ito 2008), readable in grey by their markers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from llmkit.run import drawing
from llmkit.study import looks, statistics, verdicts
from llmkit.study.verdicts import Results, Verdict

WORDS = {
    statistics.BETTER: ("o", drawing.BLUE, drawing.BLUE),
    statistics.WORSE: ("s", drawing.VERMILLION, drawing.VERMILLION),
    statistics.EQUIVALENT: ("D", drawing.GREEN, drawing.GREEN),
    statistics.UNCLEAR: ("o", "white", drawing.GREY),
    statistics.NONE: ("x", drawing.GREY, drawing.GREY),
}
"""Marker, its face and its edge for each verdict."""
TOGETHER = 6
"""More variants than this get a panel each."""


def draw(results: Results, found: Mapping[str, list[Verdict]], only: Collection[str] = ()) -> dict[str, Any]:
    """Draw every figure for which there are results, by the name of its file. To be called inside ``style``.

    ``only``: the names of those that are drawn; none: all.
    """
    setting = next(iter(found))
    drawers: dict[str, Callable[[], Any]] = {
        "differences": lambda: _differences(results, found),
        "curves": lambda: _curves(results, setting, "steps"),
        "curves_flops": lambda: _curves(results, setting, "flops"),
        "curves_seconds": lambda: _curves(results, setting, "seconds"),
        "curves_difference": lambda: _curves(results, setting, "difference"),
        "seeds": lambda: _seeds(results, setting),
        "tuning": lambda: _tuning(results),
        "costs": lambda: _costs(results, setting),
    }
    drawn = {name: drawer() for name, drawer in drawers.items() if not only or name in only}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _differences(results: Results, found: Mapping[str, list[Verdict]]) -> Any:
    """A forest plot of paired differences for each setting."""
    shown = {setting: rows for setting, rows in found.items() if any(row.difference is not None for row in rows)}
    if not shown:
        return None
    decimals = verdicts.decimals(row for rows in shown.values() for row in rows)
    figure = drawing.canvas(drawing.WIDTH, sum(0.27 * len(rows) + 0.25 for rows in shown.values()) + 0.55)
    heights = [len(rows) + 0.5 for rows in shown.values()]
    stack = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    limit = _reach([row for rows in shown.values() for row in rows], results["margin"])
    for axes, (setting, rows) in zip(stack, shown.items(), strict=True):
        if results["margin"] is not None:
            axes.axvspan(-results["margin"], results["margin"], color=drawing.SHADE, linewidth=0)
        axes.axvline(0, color=drawing.BLACK, linewidth=0.8)
        for y, row in enumerate(rows):
            _forest_row(axes, y, row, limit, decimals)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.variant for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if len(shown) > 1:
            axes.set_title(looks.label(results, setting), loc="left")
    side = "below" if results["better"] == "min" else "above"
    stack[-1].set_xlabel(f"difference to {results['baseline']} in {results['metric']} ({side} 0 is better)")
    return figure


def _reach(rows: list[Verdict], margin: float | None) -> float:
    """How far the axis of differences goes: as far as intervals and pairs do, but those of variants far off."""
    reaches = []
    for row in rows:
        if row.difference is None:
            continue
        half = row.half_all or 0 if row.word != statistics.NONE else 0
        reaches.append(max([abs(row.difference) + half, *map(abs, row.differences.values())]))
    near = [reach for reach in reaches if reach <= drawing.FAR * float(np.median(reaches))]
    return 1.1 * max(*near, 1.3 * (margin or 0)) or 1.0


def _forest_row(axes: Any, y: int, row: Verdict, limit: float, decimals: int) -> None:
    marker, face, edge = WORDS[row.word]
    text = row.word
    if row.difference is not None:
        dots = [gap for gap in row.differences.values() if abs(gap) < limit]
        axes.plot(dots, [y + 0.3] * len(dots), "|", color=drawing.GREY, markersize=3, markeredgewidth=0.6)
        if row.half is not None and row.half_all is not None and row.word != statistics.NONE:
            for half, width in ((row.half_all, 0.8), (row.half, 2.2)):
                axes.plot([row.difference - half, row.difference + half], [y, y], color=edge, linewidth=width)
        if abs(row.difference) < limit:
            axes.plot(row.difference, y, marker, markerfacecolor=face, markeredgecolor=edge, markersize=5)
        else:
            arrow = ">" if row.difference > 0 else "<"
            axes.plot(math.copysign(limit, row.difference), y, arrow, color=edge, markersize=6, clip_on=False)
        text = f"{drawing.signed(row.difference, decimals)}  {text}"
    axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7)


def _points(curve: list[list[float | None]]) -> dict[float, float]:
    return {step: value for step, value in curve if step is not None and value is not None and math.isfinite(value)}


def _curves(results: Results, setting: str, kind: str) -> Any:
    """Mean and range over the seeds at each validation.

    ``kind``: the metric on "steps", "flops" or "seconds", or the paired "difference" to the baseline on steps.
    """
    baseline = results["baseline"]
    curves: dict[str, list[dict[float, float]]] = {}
    everyone: dict[str, dict[str, dict[float, float]]] = {
        name: {seed: points for seed, curve in variant["curves"].get(setting, {}).items() if (points := _points(curve))}
        for name, variant in results["variants"].items()
    }
    for name, by_seed in everyone.items():
        if kind in ("flops", "seconds"):
            costs = results["variants"][name]["costs"]
            flops = (results["data"].get("tokens_per_step") or 0) * (costs.get("flops") or 0)
            scale = flops if kind == "flops" else costs.get("time") or 0
            found = [{step * scale: value for step, value in line.items()} for line in by_seed.values() if scale]
        elif kind == "difference":
            found = [
                {step: value - everyone[baseline][seed][step] for step, value in line.items() if step in at}
                for seed, line in by_seed.items()
                if name != baseline and (at := everyone[baseline].get(seed))
            ]
        else:
            found = list(by_seed.values())
        if found := [line for line in found if line]:
            curves[name] = found
    if not curves:
        return None
    styles = looks.looks_of(results)
    names = [name for name in styles if name in curves]
    if len(curves) <= TOGETHER:
        figure = drawing.canvas(drawing.WIDTH, 2.6)
        panels = [(figure.subplots(), names)]
    else:
        pairs = [[n for n in names if n in (baseline, name)] for name in names if name != baseline]
        figure, all_axes = drawing.panel_grid(len(pairs), 1.55, 4, sharex=True, sharey=True)
        panels = list(zip(all_axes, pairs, strict=True))
    for axes, shown in panels:
        for name in shown:
            _band(axes, curves[name], styles[name], name)
        axes.grid(axis="y")
        if kind == "difference":
            axes.axhline(0, color=drawing.BLACK, linewidth=0.8)
            if results["margin"] is not None:
                axes.axhspan(-results["margin"], results["margin"], color=drawing.SHADE, linewidth=0, zorder=0)
    late: dict[str, list[float]] = {}  # without the steep beginning
    for name, lines in curves.items():
        last = max(max(line) for line in lines)
        late[name] = [value for line in lines for at, value in line.items() if at >= last / 3]
    limits = drawing.limits_of(late, baseline)
    panels[0][0].set_ylim(limits)
    far = {name for name, values in late.items() if min(values) > limits[1] or max(values) < limits[0]}
    titles = {name: f"{name} (off the scale)" if name in far else name for name in names}
    if kind == "flops":
        from matplotlib.ticker import EngFormatter

        panels[0][0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axis = {"flops": "training FLOPs", "seconds": "seconds of training"}
    figure.supxlabel(axis.get(kind, "optimizer step"), fontsize=8)
    metric = results["metric"]
    figure.supylabel(f"{metric} minus that of {baseline}" if kind == "difference" else metric, fontsize=8)
    if len(panels) > 1:
        for axes, shown in panels:
            axes.set_title(titles[shown[-1]])
    else:
        handles, labels = panels[0][0].get_legend_handles_labels()
        panels[0][0].legend(handles, [titles[name] for name in labels], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _band(axes: Any, lines: list[dict[float, float]], look: tuple[str, str, Any], label: str) -> None:
    """Draw the mean of several curves, and the range from their smallest to their largest value."""
    colour, marker, dashes = look
    x = sorted({at for line in lines for at in line})
    values = [[line[at] for line in lines if at in line] for at in x]
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)
    means = [float(np.mean(v)) for v in values]
    every = max(1, len(x) // 8)
    axes.plot(x, means, color=colour, linestyle=dashes, marker=marker, markevery=every, label=label, markersize=3)


def _seeds(results: Results, setting: str) -> Any:
    """What each seed reached with each variant, a line for each seed."""
    names = list(looks.looks_of(results))
    samples = [verdicts.sample(results, name, setting) for name in names]
    finished = {name: one.finished for name, one in zip(names, samples, strict=True) if one.finished}
    if not finished:
        return None
    limits = drawing.limits_of(finished, results["baseline"])
    longest = max(map(len, names))
    tilted = longest * len(names) > 75
    figure = drawing.canvas(drawing.WIDTH, 2.7 + (0.05 * longest if tilted else 0))
    axes = figure.subplots()
    worst = 1.0 if results["better"] == "min" else 0.0
    for number, seed in enumerate(results["seeds"]):
        values = [one.values.get(seed, math.nan) for one in samples]
        colour = drawing.COLOURS[number % len(drawing.COLOURS)]
        marker = drawing.MARKERS[number % len(drawing.MARKERS)]
        y = [value if math.isfinite(value) else math.nan for value in values]
        look = {"color": colour, "marker": marker, "linewidth": 0.7, "markersize": 3.5}
        axes.plot(range(len(names)), y, label=f"seed {seed}", **look)
        shift = 0.4 * ((number + 0.5) / len(results["seeds"]) - 0.5)
        for x, value in enumerate(values):
            if math.isinf(value):
                edge = axes.get_xaxis_transform()
                axes.plot(x + shift, worst, "x", color=colour, transform=edge, clip_on=False)
            elif value > limits[1] or value < limits[0]:
                drawing.mark_outside(axes, x + shift, value, limits, color=colour, markersize=3.5)
    for x, one in enumerate(samples):
        if one.mean is not None:
            axes.plot([x - 0.25, x + 0.25], [one.mean] * 2, color=drawing.BLACK, linewidth=1.6, zorder=3)
    axes.set_xticks(range(len(names)), names, **({"rotation": 35, "ha": "right"} if tilted else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(limits)
    axes.set_ylabel(results["metric"])
    axes.grid(axis="y")
    if len(results["seeds"]) <= 12:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _tuning(results: Results) -> Any:
    """What each tuned value reached, a panel for each variant, with the usable window shaded."""
    styles = looks.looks_of(results)
    names = [name for name in styles if any(mean is not None for _, mean in verdicts.tuning_means(results, name))]
    if not names:
        return None
    figure, panels = drawing.panel_grid(len(names), 1.55, 4, sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        colour, marker, line = styles[name]
        means = verdicts.tuning_means(results, name)
        chosen, usable = results["variants"][name]["chosen"], verdicts.window(results, name)
        assert usable is not None
        step = means[1][0] / means[0][0] if len(means) > 1 else 1.2
        axes.axvspan(usable[0] / step**0.3, usable[1] * step**0.3, color=drawing.SHADE, linewidth=0)
        x, y = zip(*[(value, math.nan if mean is None else mean) for value, mean in means], strict=True)
        axes.plot(x, y, color=colour, linestyle=line, marker=marker)
        lost = [value for value, mean in means if mean is None]
        worst = 1.0 if results["better"] == "min" else 0.0
        if lost:  # an empty line counts as a point at the figure's corner, for which the layout makes room
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(lost, [worst] * len(lost), "x", color=colour, **edge)
        if chosen in x and math.isfinite(y[x.index(chosen)]):
            ring = {"markerfacecolor": "none", "markeredgecolor": drawing.BLACK, "markersize": 9, "clip_on": False}
            axes.plot(chosen, y[x.index(chosen)], "o", **ring)
        axes.set_title(name)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = sorted({value for name in names for value, _ in verdicts.tuning_means(results, name)})
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(FixedLocator(values[:: max(1, math.ceil((len(values) - 1) / 2))]))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    figure.supxlabel(results["tuned"]["key"] if results["tuned"] else "value", fontsize=8)
    figure.supylabel(results["metric"], fontsize=8)
    return figure


def _costs(results: Results, setting: str) -> Any:
    """The mean of the metric against each cost."""
    styles = looks.looks_of(results)
    samples = {name: verdicts.sample(results, name, setting) for name in styles}
    keys = list(dict.fromkeys(key for variant in results["variants"].values() for key in variant["costs"]))
    costs = {name: results["variants"][name]["costs"] for name in styles if samples[name].finished}
    points = {key: [(n, cost[key]) for n, cost in costs.items() if cost.get(key) is not None] for key in keys}
    points = {key: found for key, found in points.items() if found}
    if not points:
        return None
    finished = {name: one.finished for name, one in samples.items() if one.finished}
    limits = drawing.limits_of(finished, results["baseline"])
    figure, panels = drawing.panel_grid(len(points), 2.2, 4, sharey=True)
    for axes, (key, found) in zip(panels, points.items(), strict=True):
        for name, x in found:
            colour, marker, _ = styles[name]
            one = samples[name]
            axes.errorbar(x, one.mean, one.sd or 0, fmt=marker, color=colour, elinewidth=0.8, label=name)
            if one.mean is not None and not limits[0] <= one.mean <= limits[1]:
                drawing.mark_outside(axes, x, one.mean, limits, color=colour)
        values = [x for _, x in found]
        if min(values) > 0:
            room = max(1.3, (4 * min(values) / max(values)) ** 0.5)  # a factor of at least 4, so that there are ticks
            drawing.log_axis(axes.xaxis, min(values) / room, max(values) * room)
        axes.set_xlabel(looks.COSTS.get(key, key).replace(" for ", "\nfor ").replace(" without ", "\nwithout "))
        axes.grid(axis="y")
    panels[0].set_ylim(limits)
    panels[0].set_ylabel(results["metric"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure
