"""The report of a study: one page that needs nothing else, figures for a paper, and its table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.run import drawing
from llmkit.run.drawing import signed
from llmkit.study import figures, looks, page, sentences, tables, verdicts
from llmkit.study.looks import label
from llmkit.study.verdicts import Results, Verdict


def summary(results: Results) -> str:
    """Return the verdicts in a few lines, for a terminal."""
    return sentences.summary(results, verdicts.everything(results))


def write(results: Results, folder: Path) -> None:
    """Write ``report.html``, ``table.csv``, ``table.tex`` and ``figures/``; the same results give the same bytes."""
    found = verdicts.everything(results)
    decimals = verdicts.decimals(row for rows in found.values() for row in rows)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    pictures = {}
    with drawing.style():
        for name, figure in figures.draw(results, found).items():
            drawing.save(figure, folder / "figures" / f"{name}.png")
            pictures[name] = drawing.svg(figure, name, html.escape(CAPTIONS[name][0]))
    for name in CAPTIONS.keys() - pictures.keys():  # of an earlier report
        for kind in ("png", "pdf"):
            (folder / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    (folder / "table.csv").write_text(tables.as_csv(results, found), encoding="utf-8")
    (folder / "table.tex").write_text(tables.as_latex(results, found, decimals), encoding="utf-8")
    text = page.page(_title(results), _body(results, found, decimals, pictures))
    (folder / "report.html").write_text(text, encoding="utf-8")


def _title(results: Results) -> str:
    return f"{results['name']}: {results['metric']} of {len(results['variants'])} variants"


CAPTIONS = {
    "differences": (
        "Difference to the baseline",
        "Point: mean of the paired differences. Thick line: 95 % interval of this comparison. Thin line: interval that "
        "holds for all comparisons together. Ticks: the pairs. Grey band: the margin. An arrow lies outside the axis.",
    ),
    "curves": ("Learning curves", "Mean over the seeds at each validation; band: smallest to largest."),
    "curves_flops": ("Learning curves by training FLOPs", "The same, on estimated FLOPs instead of steps."),
    "curves_seconds": ("Learning curves by training time", "The same, on the seconds of calibrated steps."),
    "curves_difference": (
        "Difference during training",
        "Paired difference to the baseline at each validation, mean and range. Grey: the margin. Only the end counts.",
    ),
    "seeds": ("Seeds", "A line joins the runs of one seed. Bar: mean. Cross: diverged. Arrow: outside the axis."),
    "tuning": (
        "Tuning",
        "Mean over the tuning seeds. Ring: chosen. Grey: values that lose at most the margin (1 % without one) to the "
        "best. Cross: a run diverged.",
    ),
    "costs": ("Quality and cost", "Mean over the seeds and standard deviation of a run. Arrow: outside the axis."),
}


def _body(results: Results, found: Mapping[str, list[Verdict]], decimals: int, pictures: Mapping[str, str]) -> str:
    better = "lower is better" if results["better"] == "min" else "higher is better"
    margin = "" if results["margin"] is None else f"; differences below {results['margin']:g} do not matter"
    parts = [
        f"<h1>{html.escape(_title(results))}</h1>",
        page.paragraph(f"Against {results['baseline']}, paired by seed; {better}{margin}."),
        "<h2>Verdicts</h2>",
    ]
    for setting, rows in found.items():
        if len(found) > 1:
            parts.append(f"<h3>{_capital(label(results, setting))}</h3>")
        parts.append(_verdict_table(results, setting, rows, decimals))
    changed = [
        f"{row.variant}: {line}, {label(results, row.setting)}: {row.word}."
        for row in next(iter(found.values()))
        for line in sentences.other_settings(row, results, found)
    ]
    if changed:
        parts += ["<p>These verdicts depend on the tuning, or on what is made equal:</p>", page.bullets(changed)]
    parts += [page.figure(name, *CAPTIONS[name], picture) for name, picture in pictures.items()]
    parts += ["<h2>What was not equal</h2>", _cost_table(results)]
    parts += [page.bullets(sentences.unequal(results, found)) or "<p>Nothing else.</p>"]
    parts += ["<h2>Methods</h2>", *map(page.paragraph, sentences.methods(results, found))]
    if results["failed"]:
        parts += [
            "<h2>Failed runs</h2>",
            page.bullets(f"{item['cell']}: {item['message']}" for item in results["failed"]),
        ]
    links = [f'<a href="{file}">{file}</a>' for file in ("table.csv", "table.tex")]
    parts += ["<h2>Files</h2>", f"<p>{', '.join(links)}; each figure as PNG and PDF in <code>figures/</code>.</p>"]
    return "\n".join(part for part in parts if part)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verdict_table(results: Results, setting: str, rows: list[Verdict], decimals: int) -> str:
    metric = html.escape(results["metric"])
    head = ["variant", "verdict", metric, "difference", "95 % interval", "p (Holm)"]
    columns: dict[str, Any] = {
        "p equivalent": lambda row: tables.probability(row.p_equivalent),
        "p sign-flip": lambda row: tables.probability(row.p_sign_flip),
        "correlation": lambda row: tables.number(row.correlation, 2),
    }
    columns = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    tuned = html.escape(verdicts.short(results["tuned"]["key"])) if setting != "base" and results["tuned"] else ""
    by_name = {row.variant: row for row in rows}
    lines = []
    for name, variant in results["variants"].items():
        one = verdicts.sample(results, name, setting)
        mean = tables.number(one.mean, decimals) or ("diverged" if one.diverged else "")
        mean += f" ± {tables.number(one.sd, decimals)}" if one.sd is not None else ""
        cells = [html.escape(name), "baseline", mean, *[""] * (3 + len(columns))]
        if row := by_name.get(name):
            sentence = html.escape(verdicts.sentence(row, results["margin"], decimals)).removeprefix(row.word)
            cells[1] = f'<span class="word">{row.word}</span><span class="more">{sentence}</span>'
            gap = "" if row.difference is None else signed(row.difference, decimals)
            cells[3:] = [gap, tables.interval(row, decimals), tables.probability(row.p)]
            cells += [cell(row) for cell in columns.values()]
            cells[3:] = map(html.escape, cells[3:])
        lines.append([*cells, f"{variant['chosen']:g}" if variant["chosen"] is not None else ""] if tuned else cells)
    return page.table([*head, *columns, *([tuned] if tuned else [])], lines, 2)


def _cost_table(results: Results) -> str:
    keys = list(dict.fromkeys(key for variant in results["variants"].values() for key in variant["costs"]))
    rows = [
        [html.escape(name), *(tables.size(variant["costs"].get(key)) for key in keys)]
        for name, variant in results["variants"].items()
    ]
    return page.table(["variant", *(html.escape(looks.COSTS.get(key, key)) for key in keys)], rows, 1) if keys else ""
