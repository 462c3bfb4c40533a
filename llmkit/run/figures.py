"""Pictures of a run: the loss curve and the confusion matrix, as PNG files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.run.picture import Picture

Curve = list[tuple[int, float]]


def read_metrics(csv_file: Path) -> dict[str, Curve]:
    """Return each metric of a run's ``metrics.csv`` as (step, value) pairs."""
    curves: dict[str, Curve] = {}
    with csv_file.open(newline="") as handle:
        for row in csv.DictReader(handle):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def _axes(width: float = 7.0, height: float = 4.2) -> tuple[Picture, Any]:
    from llmkit.run.picture import Picture

    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def losses(csv_file: Path) -> dict[str, Curve]:
    """Return training and validation loss by their label; those that were not logged are left out."""
    curves = read_metrics(csv_file)
    names = {"train_loss": "training", "val_loss": "validation"}
    return {label: curves[name] for name, label in names.items() if name in curves}


def loss_curve(csv_file: Path, png_file: Path) -> None:
    """Draw training and validation loss against the step; no file where neither was logged."""
    if found := losses(csv_file):
        comparison_curves(found, png_file)


def comparison_curves(curves: Mapping[str, Curve], png_file: Path, ylabel: str = "loss (nats)") -> None:
    """Draw several curves by label into one picture."""
    curves_figure(curves, ylabel).savefig(png_file, dpi=150, bbox_inches="tight")


def curves_figure(curves: Mapping[str, Curve], ylabel: str = "loss (nats)") -> Picture:
    """Return the figure of several curves by label."""
    figure, axes = _axes()
    for number, (label, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 60 else None
        style = "-" if number < 10 else "--"  # there are ten colours
        axes.plot(steps, values, style, label=label, linewidth=1.6, marker=marker, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # outside, so that it covers no curve
    return figure


def coordinates(widths: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]], png_file: Path) -> None:
    """Draw by how much the outputs of each part changed, against the width, both in logarithms.

    Args:
        widths: the widths.
        panels: by title, the changes of each part at each width.
        png_file: where the picture goes.
    """
    figure, _ = _axes(4.0 * len(panels) + 3.0)
    figure.clear()
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, changes) in zip(row, panels.items(), strict=True):
        for number, (name, values) in enumerate(changes.items()):
            style = "-" if number < 10 else "--"
            axes.plot(widths, values, style, label=name, linewidth=1.6, marker="o", markersize=3)
        axes.set(title=title, xscale="log", yscale="log", xlabel="width")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean absolute change of a coordinate")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png_file, format="png", dpi=150, bbox_inches="tight")  # whatever a user calls the file


def learning_rates(rates: Sequence[float], losses: Sequence[float], at: int | None, png_file: Path) -> None:
    """Draw the loss of a range test against the learning rate, and the point that was chosen."""
    figure, axes = _axes()
    axes.plot(rates, losses, linewidth=1.6)
    if at is not None:
        axes.plot([rates[at]], [losses[at]], "o", label=f"falls fastest: {rates[at]:.2g}")
        axes.legend()
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, averaged over steps")
    axes.grid(alpha=0.3)
    figure.savefig(png_file, dpi=150)


def confusion_matrix(counts: list[list[int]], labels: list[str], png_file: Path) -> None:
    """Draw how often each true label (rows) was predicted as each label (columns)."""
    size = max(4.0, 0.6 * len(labels) + 2)
    figure, axes = _axes(size + 1, size)
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45, ha="right")
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 20:
        for row in ticks:
            for column in ticks:
                colour = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, counts[row][column], ha="center", va="center", color=colour, fontsize=9)
    figure.savefig(png_file, dpi=150)


def accuracy_bars(rows: list[tuple[str, float, tuple[float, float]]], png_file: Path) -> None:
    """Draw accuracies with their intervals, one line each, and the line of guessing between two."""
    figure, axes = _axes(7.0, max(1.8, 0.26 * len(rows) + 1))
    places = range(len(rows))[::-1]
    shares = [share for _, share, _ in rows]
    errors = [[share - low for _, share, (low, _) in rows], [high - share for _, share, (_, high) in rows]]
    axes.errorbar(shares, places, xerr=errors, fmt="o", markersize=4, capsize=2, linewidth=1.2)
    axes.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [name for name, *_ in rows], parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, with its 95 % interval; dotted: guessing")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(png_file, dpi=150)
