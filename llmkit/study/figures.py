"""Figures of a study, made for print: colour-blind safe (Okabe and Ito 2008), readable in grey by their markers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.study import statistics, verdicts
from llmkit.study.verdicts import Results, Verdict

BLACK, GREY, SHADE = "#000000", "#767676", "#E6E6E6"
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "s^DvPX>"
LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
WORDS = {
    statistics.BETTER: ("o", BLUE, BLUE),
    statistics.WORSE: ("s", VERMILLION, VERMILLION),
    statistics.EQUIVALENT: ("D", GREEN, GREEN),
    statistics.UNCLEAR: ("o", "white", GREY),
    statistics.NONE: ("x", GREY, GREY),
}
"""Marker, its face and its edge for each verdict."""
COSTS = {
    "params": "parameters without embeddings",
    "total_params": "parameters",
    "flops": "FLOPs for a training token",
    "cache": "bytes of cache for a sequence",
}
SETTINGS = {"tuned": "tuned", "base": "as in the base config"}
TOGETHER = 6
"""More variants than this get a panel each."""
WIDTH = 6.9


@contextmanager
def style() -> Iterator[None]:
    """Fonts and lines of all figures; drawing and saving belong inside."""
    import matplotlib

    settings: Any = {
        **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False},
        **{"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2},
        **{"axes.spines.top": False, "axes.spines.right": False, "grid.color": SHADE, "grid.linewidth": 0.6},
        **{"svg.hashsalt": "llmkit", "pdf.fonttype": 42, "lines.markersize": 4},
        "text.parse_math": False,  # a name may hold dollar signs
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style changes nothing
        with matplotlib.rc_context(settings):
            yield


def draw(results: Results, found: Mapping[str, list[Verdict]]) -> dict[str, Any]:
    """Draw every figure for which there are results, by the name of its file. To be called inside ``style``."""
    setting = next(iter(found))
    figures = {
        "differences": _differences(results, found),
        "curves": _curves(results, setting, "steps"),
        "curves_flops": _curves(results, setting, "flops"),
        "curves_difference": _curves(results, setting, "difference"),
        "seeds": _seeds(results, setting),
        "tuning": _tuning(results),
        "costs": _costs(results, setting),
    }
    figures = {name: figure for name, figure in figures.items() if figure is not None}
    for figure in figures.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for each format again
    return figures


def save(figure: Any, path: Path) -> None:
    """Write PNG and PDF; the same figure always gives the same bytes."""
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None, "Producer": None})


def svg(figure: Any, name: str, description: str) -> str:
    """Return the figure as an element of an HTML page; ``name`` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"^.*?<svg", "<svg", buffer.getvalue(), count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, height: float, columns: int, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = _figure(WIDTH if columns > 1 else 0.7 * WIDTH, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
        axes[axes.index(spare) - columns].tick_params(labelbottom=True)
    return figure, axes[:count]


def _looks(results: Results) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each variant; the baseline is black."""
    others = [name for name in results["variants"] if name != results["baseline"]]
    looks: dict[str, tuple[str, str, Any]] = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(others)
    }
    return {results["baseline"]: (BLACK, "o", "-"), **looks}


def _differences(results: Results, found: Mapping[str, list[Verdict]]) -> Any:
    """A forest plot of paired differences for each setting."""
    shown = {setting: rows for setting, rows in found.items() if any(row.difference is not None for row in rows)}
    if not shown:
        return None
    decimals = verdicts.decimals(row for rows in shown.values() for row in rows)
    figure = _figure(WIDTH, sum(0.27 * len(rows) + 0.25 for rows in shown.values()) + 0.55)
    heights = [len(rows) + 0.5 for rows in shown.values()]
    stack = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    limit = _reach([row for rows in shown.values() for row in rows], results["margin"])
    for axes, (setting, rows) in zip(stack, shown.items(), strict=True):
        if results["margin"] is not None:
            axes.axvspan(-results["margin"], results["margin"], color=SHADE, linewidth=0)
        axes.axvline(0, color=BLACK, linewidth=0.8)
        for y, row in enumerate(rows):
            _forest_row(axes, y, row, limit, decimals)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.variant for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if len(shown) > 1:
            axes.set_title(SETTINGS[setting], loc="left")
    side = "below" if results["better"] == "min" else "above"
    stack[-1].set_xlabel(f"difference to {results['baseline']} in {results['metric']} ({side} 0 is better)")
    return figure


def _reach(rows: list[Verdict], margin: float | None) -> float:
    """How far the axis of differences goes: to the widest interval, or to five times the median one."""
    reaches = [abs(r.difference) + (r.half or 0 if r.word != statistics.NONE else 0) for r in rows if r.difference]
    return 1.15 * max(min(max(reaches), 5 * float(np.median(reaches))) if reaches else 0, 1.3 * (margin or 0)) or 1.0


def _forest_row(axes: Any, y: int, row: Verdict, limit: float, decimals: int) -> None:
    marker, face, edge = WORDS[row.word]
    text = row.word
    if row.difference is not None:
        dots = [gap for gap in row.differences.values() if abs(gap) < limit]
        axes.plot(dots, [y + 0.3] * len(dots), "|", color=GREY, markersize=3, markeredgewidth=0.6)
        if row.half is not None and row.half_all is not None and row.word != statistics.NONE:
            for half, width in ((row.half_all, 0.8), (row.half, 2.2)):
                axes.plot([row.difference - half, row.difference + half], [y, y], color=edge, linewidth=width)
        if abs(row.difference) < limit:
            axes.plot(row.difference, y, marker, markerfacecolor=face, markeredgecolor=edge, markersize=5)
        else:
            arrow = ">" if row.difference > 0 else "<"
            axes.plot(math.copysign(limit, row.difference), y, arrow, color=edge, markersize=6, clip_on=False)
        text = f"{signed(row.difference, decimals)}  {text}"
    axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7)


def signed(value: float, decimals: int) -> str:
    """Return a difference with its sign, a true minus."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _points(curve: list[list[float | None]]) -> dict[float, float]:
    return {step: value for step, value in curve if step is not None and value is not None and math.isfinite(value)}


def _curves(results: Results, setting: str, kind: str) -> Any:
    """Mean and range over the seeds at each validation.

    ``kind``: the metric on "steps" or "flops", or the paired "difference" to the baseline on steps.
    """
    baseline, curves = results["baseline"], {}
    everyone = {
        name: {seed: points for seed, curve in variant["curves"].get(setting, {}).items() if (points := _points(curve))}
        for name, variant in results["variants"].items()
    }
    for name, lines in everyone.items():
        if kind == "flops":
            cost = results["variants"][name]["costs"].get("flops")
            scale = (results["data"].get("tokens_per_step") or 0) * (cost or 0)
            found = [{step * scale: value for step, value in line.items()} for line in lines.values() if scale]
        elif kind == "difference":
            found = [
                {step: value - everyone[baseline][seed][step] for step, value in line.items() if step in at}
                for seed, line in lines.items()
                if name != baseline and (at := everyone[baseline].get(seed))
            ]
        else:
            found = list(lines.values())
        if found := [line for line in found if line]:
            curves[name] = found
    if not curves:
        return None
    looks = _looks(results)
    names = [name for name in looks if name in curves]
    if len(curves) <= TOGETHER:
        figure = _figure(WIDTH, 2.6)
        panels = [(figure.subplots(), names)]
    else:
        others = [name for name in names if name != baseline]
        figure, axes_of = _panels(len(others), 1.55, 4, sharex=True, sharey=True)
        panels = [
            (axes, [n for n in names if n in (baseline, name)]) for axes, name in zip(axes_of, others, strict=True)
        ]
    for axes, shown in panels:
        for name in shown:
            _band(axes, curves[name], looks[name], name)
        axes.grid(axis="y")
        if len(panels) > 1:
            axes.set_title(shown[-1])
        if kind == "difference":
            axes.axhline(0, color=BLACK, linewidth=0.8)
            if results["margin"] is not None:
                axes.axhspan(-results["margin"], results["margin"], color=SHADE, linewidth=0, zorder=0)
    _focus(panels[0][0], curves)
    if kind == "flops":
        from matplotlib.ticker import EngFormatter

        panels[0][0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("training FLOPs" if kind == "flops" else "optimizer step", fontsize=8)
    metric = results["metric"]
    figure.supylabel(f"{metric} minus that of {baseline}" if kind == "difference" else metric, fontsize=8)
    if len(panels) == 1:
        panels[0][0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
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


def _focus(axes: Any, curves: Mapping[str, list[dict[float, float]]]) -> None:
    """Leave what lies in the first third, the steep beginning, out of the range of the values."""
    lines = [line for found in curves.values() for line in found]
    values = [value for line in lines for at, value in line.items() if at >= max(line) / 3]
    gap = 0.05 * (max(values) - min(values)) or 0.05
    axes.set_ylim(min(values) - gap, max(values) + gap)


def _seeds(results: Results, setting: str) -> Any:
    """What each seed reached with each variant, a line for each seed."""
    names = list(_looks(results))
    samples = [verdicts.sample(results, name, setting) for name in names]
    if not any(one.finished for one in samples):
        return None
    longest = max(map(len, names))
    tilted = longest * len(names) > 75
    figure = _figure(WIDTH, 2.7 + (0.05 * longest if tilted else 0))
    axes = figure.subplots()
    worst = 1.0 if results["better"] == "min" else 0.0
    for number, seed in enumerate(results["seeds"]):
        values = [one.values.get(seed, math.nan) for one in samples]
        look = {"color": COLOURS[number % 6], "marker": MARKERS[number % 7], "linewidth": 0.7, "markersize": 3.5}
        y = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(range(len(names)), y, label=f"seed {seed}", **look)
        for x in (x for x, value in enumerate(values) if math.isinf(value)):
            spread = 0.08 * (number - (len(results["seeds"]) - 1) / 2)
            top = axes.get_xaxis_transform()
            axes.plot(x + spread, worst, "x", color=COLOURS[number % 6], transform=top, clip_on=False)
    for x, one in enumerate(samples):
        if one.mean is not None:
            axes.plot([x - 0.25, x + 0.25], [one.mean] * 2, color=BLACK, linewidth=1.6, zorder=3)
    axes.set_xticks(range(len(names)), names, **({"rotation": 35, "ha": "right"} if tilted else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel(results["metric"])
    axes.grid(axis="y")
    if len(results["seeds"]) <= 12:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _tuning(results: Results) -> Any:
    """What each tuned value reached, a panel for each variant, with the usable window shaded."""
    looks = _looks(results)
    names = [name for name in looks if any(mean is not None for _, mean in verdicts.tuning_means(results, name))]
    if not names:
        return None
    figure, panels = _panels(len(names), 1.55, 4, sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        colour, marker, line = looks[name]
        means = verdicts.tuning_means(results, name)
        chosen, usable = results["variants"][name]["chosen"], verdicts.window(results, name)
        assert usable is not None
        step = means[1][0] / means[0][0] if len(means) > 1 else 1.2
        axes.axvspan(usable[0] / step**0.3, usable[1] * step**0.3, color=SHADE, linewidth=0)
        x, y = zip(*[(value, math.nan if mean is None else mean) for value, mean in means], strict=True)
        axes.plot(x, y, color=colour, linestyle=line, marker=marker)
        lost = [value for value, mean in means if mean is None]
        worst = 1.0 if results["better"] == "min" else 0.0
        axes.plot(lost, [worst] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
        if chosen in x and math.isfinite(y[x.index(chosen)]):
            ring = {"markerfacecolor": "none", "markeredgecolor": BLACK, "markersize": 9}
            axes.plot(chosen, y[x.index(chosen)], "o", **ring)
        axes.set_title(name)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = sorted({value for name in names for value, _ in verdicts.tuning_means(results, name)})
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(FixedLocator(values[:: max(1, math.ceil((len(values) - 1) / 2))]))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.supxlabel(results["tuned"]["key"] if results["tuned"] else "value", fontsize=8)
    figure.supylabel(results["metric"], fontsize=8)
    return figure


def _log_axis(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic, from ``low`` to ``high``, with at most five ticks at 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [tick for tick in (factor * power for power in powers for factor in (1, 2, 5)) if low <= tick <= high]
    if len(ticks) > 4:
        ticks = [power for power in powers if low <= power <= high]
    axis.axes.set_xscale("log")
    axis.axes.set_xlim(low, high)
    axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 5) or 1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter(sep=""))


def _costs(results: Results, setting: str) -> Any:
    """The mean of the metric against each cost."""
    looks = _looks(results)
    samples = {name: verdicts.sample(results, name, setting) for name in looks}
    keys = list(dict.fromkeys(key for variant in results["variants"].values() for key in variant["costs"]))
    points = {
        key: [(n, results["variants"][n]["costs"].get(key)) for n in looks if samples[n].finished] for key in keys
    }
    points = {key: [(n, x) for n, x in found if x is not None] for key, found in points.items()}
    points = {key: found for key, found in points.items() if found}
    if not points:
        return None
    figure, panels = _panels(len(points), 2.2, 4, sharey=True)
    for axes, (key, found) in zip(panels, points.items(), strict=True):
        for name, x in found:
            colour, marker, _ = looks[name]
            one = samples[name]
            axes.errorbar(x, one.mean, one.sd or 0, fmt=marker, color=colour, elinewidth=0.8, label=name)
        values = [x for _, x in found]
        if min(values) > 0:
            room = max(1.3, (4 * min(values) / max(values)) ** 0.5)  # a factor of at least 4, so that there are ticks
            _log_axis(axes.xaxis, min(values) / room, max(values) * room)
        axes.set_xlabel(COSTS.get(key, key).replace(" for ", "\nfor ").replace(" without ", "\nwithout "))
        axes.grid(axis="y")
    panels[0].set_ylabel(results["metric"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure
