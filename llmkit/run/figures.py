"""Pictures of a run: the loss curve, the confusion matrix and others, each as PNG and PDF."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.run import drawing

if TYPE_CHECKING:
    from llmkit.run.picture import Picture

Curve = list[tuple[int, float]]
LONG = 50
"""A curve of as many points is drawn as the mean of three neighbours, one of twice as many as that of five, ..."""


def read_metrics(csv_file: Path) -> dict[str, Curve]:
    """Return each metric of a run's ``metrics.csv`` as (step, value) pairs."""
    curves: dict[str, Curve] = {}
    with csv_file.open(newline="") as handle:
        for row in csv.DictReader(handle):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def losses(csv_file: Path) -> tuple[dict[str, Curve], str]:
    """Return training and validation loss by their label, those that were logged, and the label of their axis."""
    curves = read_metrics(csv_file)
    names = {"train_loss": "training", "val_loss": "validation"}
    found = {label: curves[name] for name, label in names.items() if name in curves}
    return found, "loss (nats per token)" if "val_perplexity" in curves else "loss"


def loss_curve(csv_file: Path, png_file: Path) -> None:
    """Draw training and validation loss against the step; no file where neither was logged."""
    found, ylabel = losses(csv_file)
    if found:
        comparison_curves(found, png_file, ylabel)


def comparison_curves(curves: Mapping[str, Curve], png_file: Path, ylabel: str) -> None:
    """Draw several curves by label into one picture."""
    with drawing.style():
        drawing.save(curves_figure(curves, ylabel), png_file)


def curves_figure(curves: Mapping[str, Curve], ylabel: str) -> Picture:
    """Return the figure of several curves by label; of a long one the mean of neighbours, and itself faintly."""
    with drawing.style():
        beside = len(curves) > 3  # then the legend stands there, and covers no curve
        figure: Picture = drawing.canvas(drawing.WIDTH * (1.0 if beside else 0.75), 3.2)
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(curves.items()):
            colour, marker, line = drawing.look(number)
            steps, values = zip(*points, strict=True)
            reach = len(points) // LONG
            shown: Sequence[float] = values
            if reach and all(map(math.isfinite, values)):
                axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.5)
                shown, label = smoothed(values, reach), f"{label}, mean of {2 * reach + 1} points"
            every = max(1, len(points) // 10)
            look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3}
            axes.plot(steps, shown, label=label, markevery=every, **look)
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        axes.grid(axis="y")
        axes.legend(**({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if beside else {}))
    return figure


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and of its neighbours, up to ``reach`` on either side.

    At the beginning, where a loss falls steeply, there are as many after a value as before it; at the end fewer.
    """
    total = [0.0, *itertools.accumulate(values)]
    sides = [(min(reach, i), min(reach, i, len(values) - 1 - i)) for i in range(len(values))]
    return [
        (total[i + after + 1] - total[i - before]) / (before + after + 1) for i, (before, after) in enumerate(sides)
    ]


def coordinates(widths: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]], png_file: Path) -> None:
    """Draw by how much the outputs of each part changed, against the width, both in logarithms.

    Args:
        widths: the widths.
        panels: by title, the changes of each part at each width.
        png_file: where the picture goes.
    """
    with drawing.style():
        figure = drawing.canvas(3.0 * len(panels) + 1.6, 3.0)
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, changes) in zip(row, panels.items(), strict=True):
            for number, (name, values) in enumerate(changes.items()):
                colour, marker, line = drawing.look(number)
                axes.plot(widths, values, color=colour, linestyle=line, marker=marker, markersize=3, label=name)
            axes.set(title=title, xlabel="width (model.dim)")
            drawing.plain_log(axes.xaxis)
            drawing.plain_log(axes.yaxis)
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.grid()
        figure.axes[0].set_ylabel("mean absolute change of a coordinate")
        figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        drawing.save(figure, png_file)


def learning_rates(rates: Sequence[float], losses: Sequence[float], at: int | None, png_file: Path) -> None:
    """Draw the loss of a range test against the learning rate, and the point that was chosen."""
    with drawing.style():
        figure = drawing.canvas(drawing.WIDTH * 0.7, 2.8)
        axes = figure.add_subplot()
        axes.plot(rates, losses, color=drawing.BLUE)
        if at is not None:
            axes.plot([rates[at]], [losses[at]], "o", color=drawing.VERMILLION, label=f"falls fastest: {rates[at]:.2g}")
            axes.legend()
        drawing.plain_log(axes.xaxis, (1,))
        axes.set(xlabel="learning rate", ylabel="loss, averaged over steps")
        axes.grid()
        drawing.save(figure, png_file)


def confusion_matrix(counts: list[list[int]], labels: list[str], png_file: Path) -> None:
    """Draw how often each true label (rows) was predicted as each label (columns)."""
    with drawing.style():
        size = max(2.6, 0.36 * len(labels) + 1.4)
        figure = drawing.canvas(size + 0.9, size)
        axes = figure.add_subplot()
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
        ticks = range(len(labels))
        axes.set_xticks(ticks, labels, rotation=45, ha="right")
        axes.set_yticks(ticks, labels)
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= 20:
            for row in ticks:
                for column in ticks:
                    colour = "white" if shares[row][column] > 0.5 else drawing.BLACK
                    axes.text(column, row, counts[row][column], ha="center", va="center", color=colour, fontsize=6)
        drawing.save(figure, png_file)


def accuracy_bars(rows: list[tuple[str, float, tuple[float, float]]], png_file: Path) -> None:
    """Draw accuracies with their intervals, one line each, and the line of guessing between two."""
    with drawing.style():
        figure = drawing.canvas(drawing.WIDTH * 0.8, max(1.4, 0.17 * len(rows) + 0.6))
        axes = figure.add_subplot()
        places = range(len(rows))[::-1]
        shares = [share for _, share, _ in rows]
        errors = [[share - low for _, share, (low, _) in rows], [high - share for _, share, (_, high) in rows]]
        look = {"color": drawing.BLUE, "markersize": 3, "capsize": 1.5, "linewidth": 1.0}
        axes.errorbar(shares, places, xerr=errors, fmt="o", **look)
        axes.axvline(0.5, color=drawing.GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(places, [name for name, *_ in rows])
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy, with its 95 % interval; dotted: guessing")
        axes.grid(axis="x")
        drawing.save(figure, png_file)
