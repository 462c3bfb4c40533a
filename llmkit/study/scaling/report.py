"""The report of a fit of scaling laws: one page, figures, and tables."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.run import drawing
from llmkit.study import page, tables
from llmkit.study.scaling import figures, sentences
from llmkit.study.scaling.sentences import TITLES, interval, shown

RESULTS = "results.json"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``report.html``, tables and ``figures/``; the same results give the same bytes."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").iterdir():
        old.unlink()
    (folder / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    pictures = []
    with drawing.style():
        for name, (figure, title, caption) in figures.draw(results).items():
            drawing.save(figure, folder / "figures" / f"{name}.png")
            pictures.append(page.figure(name, title, caption, drawing.svg(figure, name, html.escape(title))))
    for name, text in (("table.csv", _csv(results)), ("table.tex", _latex(results)), ("runs.csv", _runs(results))):
        (folder / name).write_text(text, encoding="utf-8")
    title = f"{results['name']}: loss by size and tokens"
    (folder / "report.html").write_text(page.page(title, _body(title, results, pictures)), encoding="utf-8")


def _body(title: str, results: Mapping[str, Any], pictures: list[str]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for label, variant in results["variants"].items():
        several = len(results["variants"]) > 1
        parts += [f"<h2>{html.escape(label if several else 'Result')}</h2>"]
        parts += [page.paragraph(sentences.verdict(variant)), page.bullets(variant["reasons"])]
        parts += [page.paragraph(line) for line in sentences.facts(variant)]
        parts += [_parameters(variant), "<h3>By other methods and counts</h3>", _conventions(variant)]
        parts += [page.paragraph(sentences.CONVENTIONS)]
        if variant["parabolas"]["N"]:
            parts += ["<h3>Parabolas</h3>", page.paragraph(sentences.parabolas(variant)), _parabolas(variant)]
        if rows := variant["held_out"] or variant["back_test"]:
            parts += [f"<h3>{'Held out' if variant['held_out'] else 'Back test'}</h3>"]
            parts += [page.paragraph(sentences.tested(variant)), _predictions(rows)]
    if results.get("failed"):
        parts += ["<h2>Runs without a result</h2>", page.bullets(results["failed"])]
    if results["multipliers"]:
        parts += ["<h2>Compute multipliers</h2>", page.paragraph(sentences.MULTIPLIERS), _multipliers(results)]
    parts += pictures
    parts += ["<h2>Methods</h2>", *map(page.paragraph, sentences.methods(results))]
    files = ("table.csv", "table.tex", "runs.csv", RESULTS)
    links = ", ".join(f'<a href="{file}">{file}</a>' for file in files)
    parts += ["<h2>Files</h2>", f"<p>{links}; each figure as PNG and PDF in <code>figures/</code>.</p>"]
    return "\n".join(part for part in parts if part)


def _escaped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[html.escape(cell) for cell in row] for row in rows]


def _parameters(variant: Mapping[str, Any]) -> str:
    rows = []
    for name, one in variant["parameters"].items():
        value = shown(variant, name)
        error = "" if value is None else f"{one['error']:.2g}"
        text = "not determined" if value is None else f"{value:.4g}"
        rows.append([TITLES[name], text, error, interval(one["bootstrap"]), interval(one["profile"])])
    rows += [[key, f"{value:.4g}", "", "", ""] for key, value in variant["coefficients"].items()]
    head = ["parameter", "value", "standard error", "90 % bootstrap", "90 % profile likelihood"]
    return page.table(head, _escaped(rows), 1)


def _conventions(variant: Mapping[str, Any]) -> str:
    rows = []
    for one in variant["conventions"]:
        numbers = [f"{one[key]:.3f}" if key in one else "" for key in ("exponent", "alpha", "beta", "E")]
        rows.append([one["N"], one["flops"], one["method"], *numbers])
    if (law := variant["all_vertices"]["N"]) and law != variant["laws"]["N"]:
        rows.append(
            ["N", "counted" if variant["counted"] else "6ND", "parabolas, all vertices", f"{law['exponent']:.3f}"]
        )
    rows = [row + [""] * (7 - len(row)) for row in rows]
    return page.table(["N", "FLOPs", "method", "exponent of N*", "alpha", "beta", "E"], _escaped(rows), 3)


def _parabolas(variant: Mapping[str, Any]) -> str:
    rows = []
    for size, tokens in zip(variant["parabolas"]["N"], variant["parabolas"]["D"], strict=True):
        vertices = [
            tables.size(one["vertex"]) if one["vertex"] and not one["refused"] else "" for one in (size, tokens)
        ]
        ends = "" if size["interval"] is None else " to ".join(map(tables.size, size["interval"]))
        why = size["refused"] or (f"of D*: {tokens['refused']}" if tokens["refused"] else "")
        rows.append([f"{size['budget']:.3g}", why or "used", str(len(size["runs"])), vertices[0], ends, vertices[1]])
    head = ["budget, FLOPs", "vertex", "runs", "N*", "90 % interval", "D*"]
    return page.table(head, _escaped(rows), 2)


def _predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        inside = "inside" if row["low"] <= row["loss"] <= row["high"] else "outside"
        numbers = [f"{row[key]:.4f}" for key in ("loss", "predicted")]
        ends = f"{row['low']:.4f} to {row['high']:.4f}"
        lines.append([tables.size(row["N"]), tables.size(row["D"]), *numbers, ends, inside])
    return page.table(["N", "D", "measured", "predicted", "90 % interval", "measured is"], _escaped(lines), 1)


def _multipliers(results: Mapping[str, Any]) -> str:
    rows = [
        [row["variant"], f"{row['C']:.3g}", sentences.times(row["value"]), sentences.span(row["low"], row["high"])]
        for row in results["multipliers"]
    ]
    head = [
        "variant",
        "FLOPs",
        f"compute that {html.escape(results['multipliers'][0]['baseline'])} needs",
        "90 % interval",
    ]
    return page.table(head, _escaped(rows), 1)


def _csv(results: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    head = ("variant", "parameter", "value", "standard_error", "bootstrap_low", "bootstrap_high")
    table.writerow([*head, "profile_low", "profile_high", "determined"])
    for label, variant in results["variants"].items():
        for name, one in variant["parameters"].items():
            value = shown(variant, name)
            ends = [*one["bootstrap"], *one["profile"]]
            table.writerow([label, name, value, None if value is None else one["error"], *ends, value is not None])
        for key, value in variant["coefficients"].items():
            table.writerow([label, key, value, *[None] * 6])
    return buffer.getvalue()


def _runs(results: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    names = {"N": "params", "D": "tokens", "C": "flops"}
    (first, *_) = results["variants"].values()
    table.writerow(["variant", *(names.get(key, key) for key in first["points"][0])])
    for label, variant in results["variants"].items():
        table.writerows([label, *point.values()] for point in variant["points"])
    return buffer.getvalue()


def _latex(results: Mapping[str, Any]) -> str:
    """Return a table for ``\\usepackage{booktabs}``."""
    names = {"alpha": r"$\alpha$", "beta": r"$\beta$", "exponent": "$a$", "E": "$E$"}
    lines = [r"\begin{tabular}{lrrrrr}", r"\toprule", rf"variant & runs & {' & '.join(names.values())} \\", r"\midrule"]
    for label, variant in results["variants"].items():
        cells = [tables.latex_text(label), str(variant["runs"])]
        for name in names:
            value, one = shown(variant, name), variant["parameters"][name]
            low, high = one["bootstrap"]
            cells.append("---" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
