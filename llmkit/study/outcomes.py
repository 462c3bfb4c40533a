"""One run of a study, and what became of it, read from its folder. Nothing here needs torch."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.errors import UserError

OUTCOME, CELLS = "outcome.json", "cells.json"


@dataclass(frozen=True)
class Cell:
    """One run: ``llmkit fit`` with these words, in a folder of its own."""

    name: str
    words: tuple[str, ...]
    variant: str
    seed: int
    value: float | None = None
    """Of the tuned key; None: that of the base config."""
    begins: str | None = None
    """The cell from whose last checkpoint it begins; None: at the start."""


class Outcome(NamedTuple):
    """What became of a cell."""

    value: float | None
    """The metric at the last step; None: the run diverged."""
    curve: list[tuple[int, float]]
    """(step, metric) of each validation."""


def outcome_of(folder: Path, metric: str) -> Outcome | None:
    """Return what became of the run in a folder; None: it has not ended yet.

    Raises UserError when it has no such metric.
    """
    written = _json(folder / OUTCOME)
    if written is None:
        return None
    if written["diverged"]:
        return Outcome(None, [])
    curve = _curve(Path(folder, written["run"], "metrics.csv"), metric)
    if not curve:
        names = [name for name in written["metrics"] if name.startswith("val_")]
        raise UserError(f"metric: {folder} has no {metric}; it has {', '.join(names) or 'no validation data'}")
    value = curve[-1][1]
    return Outcome(value if math.isfinite(value) else None, curve)


def _curve(file: Path, metric: str) -> list[tuple[int, float]]:
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = [(int(row["step"]), row.get(metric)) for row in csv.DictReader(handle)]
    except OSError:
        return []
    # Lightning numbers steps from 0: the validation after 200 steps is logged at 199.
    return [(step + 1, float(value)) for step, value in rows if value]


def failure(folder: Path) -> str:
    """Return why the last try of a cell failed: the last line of its log that llmkit reported."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("llmkit: error: ")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
