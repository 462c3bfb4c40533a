"""What all figures share: colours, fonts, axes, and how they become files."""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import note

BLACK, GREY, SHADE = "#000000", "#767676", "#E6E6E6"
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
"""Colours that colour-blind people can tell apart (Okabe and Ito 2008)."""
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "s^DvPX>"
LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))
FONTS = (
    *("Noto Sans CJK", "Noto Sans SC", "Noto Sans JP", "Noto Sans TC", "Noto Sans KR", "Source Han Sans", "WenQuanYi"),
    *(
        "Microsoft YaHei",
        "SimHei",
        "PingFang",
        "Hiragino Sans",
        "Yu Gothic",
        "Meiryo",
        "Malgun Gothic",
        "Arial Unicode MS",
    ),
)
"""How the names of fonts with Chinese, Japanese and Korean begin; the first that is installed is used."""
FAR = 5
"""Variants so many times farther off than the median one lie outside the axes, so that the others can be told apart."""
WIDTH = 6.9


@contextmanager
def style() -> Iterator[None]:
    """Fonts and lines of all figures; drawing and saving belong inside. A note says if a font lacks characters."""
    import matplotlib

    settings: Any = {
        **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False},
        **{"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2},
        **{"axes.spines.top": False, "axes.spines.right": False, "grid.color": SHADE, "grid.linewidth": 0.6},
        **{"svg.hashsalt": "llmkit", "pdf.fonttype": 42, "lines.markersize": 4},
        "font.family": ["DejaVu Sans", *cjk_font()],
        "text.parse_math": False,  # a name may hold dollar signs
    }
    with warnings.catch_warnings(record=True) as caught, matplotlib.rc_context():
        warnings.simplefilter("always")
        matplotlib.rcdefaults()  # a user's own style changes nothing
        with matplotlib.rc_context(settings):
            yield
    for one in caught:
        if "missing from font" in str(one.message):
            _note_missing()
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@functools.cache
def _note_missing() -> None:
    note("figures show boxes for characters that no font of this machine has: install Noto Sans CJK, say")


@functools.cache
def cjk_font() -> list[str]:
    """Return the name of an installed font with Chinese, Japanese and Korean; nothing if there is none."""
    from matplotlib import font_manager

    known = sorted({font.name for font in font_manager.fontManager.ttflist})
    return [name for start in FONTS for name in known if name.startswith(start)][:1]


def lay_out(figure: Any) -> None:
    """Fix where everything in a figure stands, once for all formats that it is written in."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG under this name, and as PDF next to it; the same figure always gives the same bytes."""
    lay_out(figure)
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
    empty = {"CreationDate": None, "Creator": None, "Producer": None}
    figure.savefig(path.with_suffix(".pdf"), metadata=empty)


def svg(figure: Any, name: str, description: str) -> str:
    """Return the figure as an element of an HTML page; ``name`` keeps its ids apart from those of other figures."""
    lay_out(figure)
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


def look(number: int) -> tuple[str, str, Any]:
    """Return colour, marker and line of the curve with this number: 24 can be told apart, in grey too."""
    lines, times = ("-", *LINES), number // len(COLOURS)  # each time around a colour has another line
    return COLOURS[number % len(COLOURS)], f"o{MARKERS}"[number % 8], lines[(number + times + times // 2) % len(lines)]


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


def plain_log(axis: Any, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """Make an axis logarithmic, with ticks at ``steps`` times a power of ten, written as 0.001."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
