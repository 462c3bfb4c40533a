"""``llmkit scale fit``: fit scaling laws to anybody's runs, and say what they do not show."""

from __future__ import annotations

import math
from pathlib import Path

from llmkit.commands import Parser, at_least
from llmkit.errors import UserError
from llmkit.study.scaling import report, sentences
from llmkit.study.scaling.analysis import analyse
from llmkit.study.scaling.runs import KEYS, read
from llmkit.study.scaling.surface import scipy_part

DESCRIPTION = (
    "Fit the loss of trained models as a function of their parameters and tokens, E + A / N^alpha + B / D^beta, with "
    "intervals, and report which exponents the runs determine. docs/scaling.md explains the method."
)


def run(command: str, argv: list[str]) -> int:
    """Fit runs, write the report, and print its summary; returns the exit code."""
    parser = Parser(command, DESCRIPTION)
    add = parser.add_argument
    add(
        "files", nargs="+", metavar="FILE[:KEY=NUMBER,...]", help="CSV files with a row for each run; values for a file"
    )
    add("--columns", metavar="KEY=COLUMN,...", help=f"what is where, as in N=params,D=tokens,L=loss; {', '.join(KEYS)}")
    add("--where", action="append", default=[], metavar="CONDITION", help="rows to keep, such as 'loss<5'; repeatable")
    add(
        "--hold_out",
        type=float,
        metavar="FLOPS",
        help="predict the runs of so many FLOPs or more instead of fitting them",
    )
    add("--draws", type=at_least(20), default=1000, help="bootstrap samples; default 1000")
    add("--output", metavar="FOLDER", help="where the report goes; default: runs/ and the name of the first file")
    options = parser.parse(argv)
    if options.hold_out is not None and not (math.isfinite(options.hold_out) and options.hold_out > 0):
        raise UserError(f"--hold_out: expected a number of FLOPs above 0, got {options.hold_out:g}")
    scipy_part("optimize")  # a missing package is noticed first
    runs = read(options.files, options.columns, options.where)
    stem = Path(options.files[0].partition(":")[0]).stem
    facts = {
        "source": ", ".join(Path(file).name for file in options.files),
        "columns": options.columns,
        "where": options.where,
    }
    held = None
    if options.hold_out is not None:
        held = {name: one.take(options.hold_out <= one.C) for name, one in runs.items()}
        runs = {name: one.take(options.hold_out > one.C) for name, one in runs.items()}
    results = analyse(runs, stem, options.draws, held, **facts)
    folder = Path(options.output or Path("runs", stem))
    report.write(results, folder)
    print(f"{sentences.summary(results)}\n\nreport: {folder / 'report.html'}")
    return 0
