"""The report of a frontier: a page that opens without a network, a picture, and tables."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.analysis.compress.frontier import as_csv, best
from llmkit.analysis.compress.measure import SIZES
from llmkit.run import drawing
from llmkit.run.drawing import signed
from llmkit.study import page

READING = (
    "Quality is the mean loss of the same rows, row by row against the original: the difference has the 95 % t "
    "interval over rows. It says nothing about other data, or about what is generated.",
    "Bytes are those of the files; that of the original has no optimizer state. Memory is what a process of its own "
    "needs beyond what it held with llmkit imported: at its highest point, and after one pass of two tokens.",
    "Times are measured on this machine, one model after the other in each round; a ratio has the 95 % t interval over "
    "rounds. What is not faster here may be so on other hardware, or at other sizes.",
)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``frontier.json``, ``frontier.csv``, ``frontier.png``, ``frontier.pdf`` and ``report.html``."""
    (folder / "frontier.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "frontier.csv").write_text(as_csv(results), encoding="utf-8")
    with drawing.style():
        figure = draw(results)
        drawing.save(figure, folder / "frontier.png")
        picture = drawing.svg(figure, "frontier", html.escape(caption(results)))
    (folder / "report.html").write_text(page.page(title(results), _body(results, picture)), encoding="utf-8")


def title(results: Mapping[str, Any]) -> str:
    """Return the title of the report."""
    return f"{results['checkpoint']}: {len(results['settings']) - 1} compressed models"


def caption(results: Mapping[str, Any]) -> str:
    """Return what the picture shows."""
    return (
        f"Loss of {results['rows']} {results['stage']} rows by bytes on disk and by time of one {results['unit']} at "
        f"batch {SIZES[0]}. Bar: 95 % interval of the difference to the original. Line: forms that none beats in both."
    )


def draw(results: Mapping[str, Any]) -> Any:
    """Return the picture: loss against bytes, and against time."""
    settings = results["settings"]
    axes_of = {"bytes": "bytes on disk", f"ms_{SIZES[0]}": f"ms a {results['unit']} at batch {SIZES[0]}"}
    figure, axes = drawing.panel_grid(2, 3.3, 2)
    for panel, (cost, label) in zip(axes, axes_of.items(), strict=True):
        front = sorted((one for one in settings if one["name"] in best(settings, cost)), key=lambda one: one[cost])
        panel.plot(
            [one[cost] for one in front], [one["loss"] for one in front], color=drawing.SHADE, linewidth=3, zorder=0
        )
        for number, one in enumerate(settings):
            if one["loss"] is None:
                continue
            colour = drawing.COLOURS[(number - 1) % len(drawing.COLOURS)] if number else drawing.BLACK
            half = None if one["low"] is None else (one["high"] - one["low"]) / 2
            marker = drawing.MARKERS[(number - 1) % len(drawing.MARKERS)] if number else "o"
            panel.errorbar(one[cost], one["loss"], half, color=colour, marker=marker, label=one["name"], linestyle="")
        values = [one[cost] for one in settings]
        drawing.log_axis(panel.xaxis, min(values) / 1.3, max(values) * 1.3)
        panel.grid(axis="y")
        panel.set(xlabel=label, ylabel="loss (nats)")
        losses = [one["loss"] for one in settings if one["loss"] is not None]
        if max(losses) - settings[0]["loss"] > 1:  # one that is ruined leaves the others apart
            panel.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as texts: the head, then a row for each model."""
    memory = any(one["held"] is not None for one in results["settings"])
    head = ["model", "bytes", "of original", *(["peak memory", "held"] if memory else [])]
    for size in SIZES:
        head += [f"ms/{results['unit']} at {size}", "of original"]
    head += ["loss", "difference", "95 % interval", "remarks"]
    lines = [head]
    for one in results["settings"]:
        line = [one["name"], f"{one['bytes']:,}", f"{one['bytes_ratio']:.2f}"]
        if memory:
            line += [f"{one[key] / 2**20:,.1f} MiB" for key in ("peak", "held")]
        for size in SIZES:
            line += [f"{one[f'ms_{size}']:.3g}", f"{one[f'ms_{size}_ratio']:.2f}"]
        if one["loss"] is None:
            line += ["not finite", "", ""]
        else:
            ends = "" if one["low"] is None else f"{signed(one['low'], 4)} to {signed(one['high'], 4)}"
            line += [
                f"{one['loss']:.4f}",
                *((signed(one["difference"], 4), ends) if one["difference"] is not None else ("", "")),
            ]
        lines.append([*line, "; ".join(one["notes"])])
    for line in lines[1:2]:
        line[-3:] = ["", "", ""]
    return lines


def _body(results: Mapping[str, Any], picture: str) -> str:
    head, *lines = ([html.escape(cell) for cell in line[:-1]] for line in rows(results))
    links = ", ".join(f'<a href="frontier.{kind}">{kind.upper()}</a>' for kind in ("png", "pdf"))
    text = f"<figcaption>{html.escape(caption(results))} {links}</figcaption>"
    files = ", ".join(f'<a href="{one["file"]}">{one["file"]}</a>' for one in results["settings"])
    parts = [
        f"<h1>{html.escape(title(results))}</h1>",
        page.paragraph(verdict(results)),
        f"<figure>\n<div>{picture}</div>\n{text}\n</figure>",
        page.table(head, lines, 1),
        page.bullets(f"{one['name']}: {'; '.join(one['notes'])}" for one in results["settings"] if one["notes"]),
        "<h2>What the numbers show</h2>",
        *map(page.paragraph, [*READING, setup(results)]),
        "<h2>Files</h2>",
        f'<p>{files}; <a href="frontier.json">frontier.json</a>, <a href="frontier.csv">frontier.csv</a></p>',
    ]
    return "\n".join(parts)


def setup(results: Mapping[str, Any]) -> str:
    """Return how it was measured, in a sentence."""
    read = f"; methods that calibrate read {results['calibration']} training rows" if results["calibration"] else ""
    threads = f"{results['threads']} thread{'s' * (results['threads'] > 1)}"
    return f"{results['rows']} {results['stage']} rows, {results['rounds']} rounds of times, {threads}{read}."


def verdict(results: Mapping[str, Any]) -> str:
    """Return the smallest model whose interval does not lie above the original's loss, in a sentence."""
    others: Sequence[Mapping[str, Any]] = results["settings"][1:]
    fine = [one for one in others if one["low"] is not None and one["low"] <= 0 and one["bytes_ratio"] < 1]
    if not fine:
        return "Every smaller model has a loss that is above the original's, beyond its interval."
    least = min(fine, key=lambda one: one["bytes"])
    return (
        f"{least['name']} is the smallest whose loss cannot be told from the original's, or is lower: "
        f"{least['bytes_ratio']:.0%} of its bytes, difference {signed(least['difference'], 4)}."
    )
