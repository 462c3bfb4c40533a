"""The table of a study as CSV and LaTeX, and what its columns hold."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

from llmkit.run.drawing import signed
from llmkit.study import verdicts
from llmkit.study.looks import label
from llmkit.study.verdicts import Results, Verdict

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, decimals: int) -> str:
    """Return a number with a true minus; empty for None."""
    return "" if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def probability(value: float | None) -> str:
    """Return a p-value, ``.013`` or ``< .001``; empty for None."""
    if value is None:
        return ""
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def interval(verdict: Verdict, decimals: int) -> str:
    """Return the 95 % interval of a difference, ``[−0.03, −0.01]``."""
    if verdict.difference is None or verdict.half is None:
        return ""
    ends = (verdict.difference - verdict.half, verdict.difference + verdict.half)
    return f"[{', '.join(signed(end, decimals) for end in ends)}]"


def size(value: float | None) -> str:
    """Return a large number in three digits, ``1.70 M``."""
    if not value:
        return "" if value is None else "0"
    power = min(6, max(0, math.floor(math.log10(abs(value)) / 3)))
    digits = f"{value / 1000**power:#.3g}".removesuffix(".")
    return f"{digits} {' kMGTPE'[power].strip()}".strip()


def as_csv(results: Results, found: Mapping[str, list[Verdict]]) -> str:
    """Return everything of the table in full precision, a line for each variant and setting."""
    costs = list(dict.fromkeys(key for variant in results["variants"].values() for key in variant["costs"]))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(
        [
            *("setting", "variant", "verdict", "runs", "diverged", "mean", "sd", "pairs", "difference", "low", "high"),
            *("sd_of_differences", "p_holm", "p_equivalent_holm", "p_sign_flip", "correlation", "visible_difference"),
            *("tuned_value", *costs),
        ]
    )
    for setting, rows in found.items():
        by_name = {row.variant: row for row in rows}
        for name, variant in results["variants"].items():
            one = verdicts.sample(results, name, setting)
            words: list[Any] = ["baseline", len(one.values), one.diverged, one.mean, one.sd]
            numbers: list[Any] = [None] * 10
            if row := by_name.get(name):
                words[0] = row.word
                ends: list[float | None] = [None, None]
                if row.difference is not None and row.half is not None:
                    ends = [row.difference - row.half, row.difference + row.half]
                numbers = [row.pairs, row.difference, *ends, row.sd, row.p, row.p_equivalent]
                numbers += [row.p_sign_flip, row.correlation, row.visible]
            chosen = variant["chosen"] if setting != "base" else None
            own = verdicts.costs(results, name, setting)
            table.writerow([setting, name, *words, *numbers, chosen, *(own.get(key) for key in costs)])
    return buffer.getvalue()


def latex_text(text: str) -> str:
    """Return plain text with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {MINUS: "$-$", "±": r"$\pm$", "<": "$<$", ">": "$>$", "×": r"$\times$"}
    return "".join(special.get(character, character) for character in text)


def as_latex(results: Results, found: Mapping[str, list[Verdict]], decimals: int) -> str:
    """Return a table for ``\\usepackage{booktabs}``."""
    metric = latex_text(results["metric"])
    lines = [
        r"\begin{tabular}{lrlrlrl}",
        r"\toprule",
        rf"variant & parameters & {metric} & difference & 95\,\% interval & $p$ & verdict \\",
    ]
    for setting, rows in found.items():
        by_name = {row.variant: row for row in rows}
        lines.append(r"\midrule")
        if len(found) > 1:
            lines += [rf"\multicolumn{{7}}{{l}}{{\emph{{{label(results, setting)}}}}} \\"]
        for name in results["variants"]:
            one = verdicts.sample(results, name, setting)
            mean = number(one.mean, decimals) + (f" ± {number(one.sd, decimals)}" if one.sd is not None else "")
            cells = [
                name,
                size(verdicts.costs(results, name, setting).get("params")),
                mean or "diverged",
                "",
                "",
                "",
                "",
            ]
            if row := by_name.get(name):
                gap = "" if row.difference is None else signed(row.difference, decimals)
                words = verdicts.sentence(row, results["margin"], decimals)
                cells[3:] = [gap, interval(row, decimals), probability(row.p), words]
            else:
                cells[-1] = "baseline"
            lines.append(" & ".join(latex_text(cell) for cell in cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
