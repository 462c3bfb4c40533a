"""What the figures of a study share: colours, names, axes, and how they become files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.study.verdicts import Results

BLACK, GREY, SHADE = "#000000", "#767676", "#E6E6E6"
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "s^DvPX>"
LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
COSTS = {
    "params": "parameters without embeddings",
    "total_params": "parameters",
    "flops": "FLOPs for a training token",
    "cache": "bytes of cache for a sequence",
    "time": "seconds for a training step",
}
EQUAL = {
    "params": "at equal parameters",
    "flops": "at equal FLOPs for a token",
    "time": "at equal training time",
    "none": "as large as they are",
}
"""What is made equal, in words."""
FAR = 5
"""Variants so many times farther off than the median one lie outside the axes, so that the others can be told apart."""
WIDTH = 6.9


def label(results: Results, setting: str) -> str:
    """Return what a setting is called."""
    if setting == "base" and results["tuned"] is None:
        return EQUAL[results["match"]]
    return {"tuned": "tuned", "base": "as in the base config", **EQUAL}[setting]


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


def canvas(width: float, height: float) -> Any:
    from llmkit.run.picture import Picture

    return Picture(figsize=(width, height), layout="constrained")


def panel_grid(count: int, height: float, columns: int, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = canvas(WIDTH if columns > 1 else 0.7 * WIDTH, rows * height)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
        axes[axes.index(spare) - columns].tick_params(labelbottom=True)
    return figure, axes[:count]


def looks_of(results: Results) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each variant; the baseline is black."""
    others = [name for name in results["variants"] if name != results["baseline"]]
    looks: dict[str, tuple[str, str, Any]] = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, name in enumerate(others)
    }
    return {results["baseline"]: (BLACK, "o", "-"), **looks}


def signed(value: float, decimals: int) -> str:
    """Return a difference with its sign, a true minus."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def limits_of(groups: Mapping[str, list[float]], baseline: str) -> tuple[float, float]:
    """The range of an axis for values of several variants, without those of variants far off; the baseline is in it."""
    middles = {name: float(np.mean(values)) for name, values in groups.items()}
    centre = float(np.median(list(middles.values())))
    typical = np.median([abs(middle - centre) for middle in middles.values()])
    typical += np.median([max(values) - min(values) for values in groups.values()]) / 2
    near = [groups[name] for name, middle in middles.items() if abs(middle - centre) <= FAR * typical]
    values = sum(near, groups.get(baseline, []))
    gap = 0.06 * (max(values) - min(values)) or 0.05
    return min(values) - gap, max(values) + gap


def mark_outside(axes: Any, x: float, value: float, limits: tuple[float, float], **look: Any) -> None:
    """Mark a value that lies outside the axes by an arrow at their edge."""
    above = value > limits[1]
    edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(x, 1.0 if above else 0.0, marker="^" if above else "v", linestyle="", **edge, **look)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic, from ``low`` to ``high``, with at most five ticks at 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [tick for tick in (factor * power for power in powers for factor in (1, 2, 5)) if low <= tick <= high]
    if len(ticks) > 4:
        ticks = [power for power in powers if low <= power <= high]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 5) or 1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter(sep=""))
