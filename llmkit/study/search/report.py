"""The report of a search: one page, figures, a table, and the best config."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.run import drawing
from llmkit.study import page, tables
from llmkit.study.search import figures

Results = Mapping[str, Any]
RESULTS, BEST = "results.json", "best.yaml"


def write(results: Results, folder: Path) -> None:
    """Write ``report.html``, ``best.yaml``, ``trials.csv`` and ``figures/``; the same results give the same bytes."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").iterdir():
        old.unlink()
    pictures = []
    with drawing.style():
        for name, (figure, title, caption) in figures.draw(results).items():
            drawing.save(figure, folder / "figures" / f"{name}.png")
            pictures.append(page.figure(name, title, caption, drawing.svg(figure, name, html.escape(title))))
    (folder / "trials.csv").write_text(_csv(results), encoding="utf-8")
    if results["best"] is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        head = f"# {best_line(results)} Trained and chosen with this seed: judge it with others.\n"
        (folder / BEST).write_text(head + results["config"] + "\n", encoding="utf-8")
    title = f"{results['name']}: {results['metric']} of {len(results['trials'])} trials"
    (folder / "report.html").write_text(page.page(title, _body(title, results, pictures)), encoding="utf-8")


def shown(value: Any) -> str:
    """Return a value of a key as text, a choice by its JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def best_line(results: Results) -> str:
    """Return which trial is the best, and its result."""
    if results["best"] is None:
        return "No trial has a result."
    row = next(row for row in results["trials"] if row["trial"] == results["best"])
    return f"Best of {len(results['trials'])} trials: {row['trial']}, {results['metric']} {row['value']:.4g}."


def summary(results: Results) -> str:
    """Return the result in a few lines, for a terminal."""
    lines = [best_line(results)]
    if results["best"] is not None:
        values = next(row["values"] for row in results["trials"] if row["trial"] == results["best"])
        lines += [f"  {key}: {shown(value)}" for key, value in values.items()]
    return "\n".join([*lines, *sentences(results)])


def sentences(results: Results) -> list[str]:
    """Return what was spent, what is missing, and what the best result is worth."""
    rows = results["trials"]
    lost = {
        "were the same as an earlier one and did not run again": sum(row["same_as"] is not None for row in rows),
        "diverged": sum(row["state"] == "diverged" for row in rows),
        "could not be built": sum(row["state"] == "refused" for row in rows),
    }
    which = "".join(f"; {count} {what}" for what, count in lost.items() if count)
    spent = [sum(row[key] for row in rows) for key in ("tokens", "flops")]
    lines = [
        f"Budget: {len(rows)} of {results['planned']} trials, {spent[0]:,} training tokens and {spent[1]:.3g} FLOPs in "
        f"all{which}. A comparison with another model is fair if that one gets as many trials on as many tokens."
    ]
    if unfinished := len(results["failed"]):
        lines.append(f"The search stopped because {unfinished} run(s) failed; the same command tries them again.")
    if results["best"] is not None:
        lines.append(
            f"The best of {len(rows)} is optimistic: it was chosen by the value that it shows. The test data were not "
            "read. Train best.yaml with other seeds before you report a number, and test once."
        )
    return lines


def _body(title: str, results: Results, pictures: list[str]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>", page.paragraph(best_line(results))]
    if results["best"] is not None:
        values = next(row["values"] for row in results["trials"] if row["trial"] == results["best"])
        rows = [[html.escape(cell) for cell in (key, shown(value))] for key, value in values.items()]
        importance = results["importance"]
        if importance:
            rows = [[*row, f"{importance.get(key, 0):.2f}"] for row, key in zip(rows, values, strict=True)]
        rows = [
            [*row, html.escape(space["text"])]
            for row, space in zip(rows, (results["space"][key] for key in values), strict=True)
        ]
        parts.append(page.table(["key", "best", *["importance"] * bool(importance), "searched"], rows, 4))
    parts += [page.paragraph(line) for line in sentences(results)]
    parts.append(page.bullets(f"{one['cell']}: {one['message']}" for one in results["failed"]))
    parts += [*pictures, "<h2>Trials</h2>", _table(results), "<h2>Methods</h2>"]
    side = "lower" if results["better"] == "min" else "higher"
    base = f"Base config {results['base']}"
    parts.append(
        page.paragraph(
            f"{base}{', ' if results['options'] else ''}{' '.join(results['options'])}. Suggestions: Optuna, sampler "
            f"{results['sampler']}, seed {results['seed']}, in rounds of {results['round']}, each from the results of "
            f"all earlier rounds. Result of a trial: {results['metric']} on the validation data at the last step "
            f"({side} is better), one run with one seed, the same for all. Trials that diverged or could not be built "
            f"count as the worst. llmkit {results['llmkit']}."
        )
    )
    names = [*([BEST] if results["best"] is not None else []), "trials.csv", RESULTS]
    links = ", ".join(f'<a href="{file}">{file}</a>' for file in names)
    parts += ["<h2>Files</h2>", f"<p>{links}; each figure as PNG and PDF in <code>figures/</code>.</p>"]
    return "\n".join(part for part in parts if part)


def _result(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.5g}" if row["value"] is not None else row["state"]


def _table(results: Results) -> str:
    """Return the trials, the best first."""
    sign = 1 if results["better"] == "min" else -1
    order = sorted(results["trials"], key=lambda row: (row["value"] is None, sign * (row["value"] or 0), row["trial"]))
    rows = []
    for row in order:
        notes = row["why"] or (f"as trial {row['same_as']}" if row["same_as"] is not None else "")
        cells = [
            str(row["trial"]),
            _result(row),
            *map(shown, row["values"].values()),
            tables.size(row["params"]),
            notes,
        ]
        rows.append([html.escape(cell) for cell in cells])
    head = ["trial", results["metric"], *results["space"], "parameters", "note"]
    return page.table([html.escape(cell) for cell in head], rows, 1)


def _csv(results: Results) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    costs = ("params", "steps", "tokens", "flops", "same_as", "why", "cell")
    table.writerow(["trial", "state", results["metric"], *results["space"], *costs])
    for row in results["trials"]:
        values = map(shown, row["values"].values())
        table.writerow([row["trial"], row["state"], row["value"], *values, *(row[key] for key in costs)])
    return buffer.getvalue()
