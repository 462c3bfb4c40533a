"""The trials of a search: their configs, their runs, and their results as plain data, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmkit
from llmkit.errors import UserError
from llmkit.study.cells import StudyPlan
from llmkit.study.match import BuildAndDo, Variant, variants
from llmkit.study.outcomes import Cell, Outcome
from llmkit.study.search.spec import Choice, Range, Search
from llmkit.study.search.suggest import importances

ENDED, DIVERGED, REFUSED = "ended", "diverged", "refused"


@dataclass
class Trial:
    """A trial.

    Attributes:
        number: its place, from 0.
        values: of each key of the space.
        first: the first trial with the same values, whose run this one shares.
        variant: its config; None: it cannot be built.
        refused: why it cannot be built.
    """

    number: int
    values: dict[str, Any]
    first: int
    variant: Variant | None = None
    refused: str = ""


class Trials:
    """All trials so far, each built once.

    Args:
        search: what is searched.
        build: builds what ``fit`` would build from words, and calls a function with it.

    Raises:
        UserError: the base config cannot be built, or has no such metric.
    """

    def __init__(self, search: Search, build: BuildAndDo) -> None:
        self.search, self._build = search, build
        self.base = variants(search.as_study("base", {}), build)["base"]
        self._variants = {"base": self.base}
        self.plan = StudyPlan(search.as_study("base", {}), self._variants)
        self.all: list[Trial] = []

    def add(self, values: dict[str, Any]) -> Trial:
        """Return a new trial. Values that no model can be built from are refused here: they would fail in every run."""
        number = len(self.all)
        same = next((trial for trial in self.all if trial.values == values), None)
        if same is not None:
            trial = Trial(number, values, same.first, same.variant, same.refused)
        else:
            trial, name = Trial(number, values, number), f"trial{number:03d}"
            try:
                trial.variant = variants(self.search.as_study(name, values), self._build)[name]
                self._variants[name] = trial.variant
            except UserError as error:
                trial.refused = str(error.problems[0]).removeprefix(f"variant {name}: ")
        self.all.append(trial)
        return trial

    def cell(self, trial: Trial) -> Cell | None:
        """Return the run of a trial; None: there is none."""
        return self.plan.trial(trial.variant.name) if trial.variant else None

    def outcome(self, trial: Trial) -> Outcome | None:
        """Return what became of a trial; None: it has not ended yet. One that was refused counts as diverged."""
        cell = self.cell(trial)
        return self.plan.outcome(cell) if cell else Outcome(None, [])

    def gather(self, failed: Mapping[str, str]) -> dict[str, Any]:
        """Return all results so far. They depend on nothing but the study and the folders of its runs.

        Args:
            failed: the message of each run that failed.
        """
        search = self.search
        rows = [row for trial in self.all if (row := self._row(trial)) is not None]
        told = [(trial.values, outcome.value) for trial in self.all if (outcome := self.outcome(trial)) is not None]
        return {
            "name": search.name,
            "llmkit": llmkit.__version__,
            "base": ", ".join(Path(w.partition("=")[2]).name for w in search.base if w.startswith("--config=")),
            "options": [word for word in search.base if not word.startswith("--config=")],
            "metric": self.plan.metric,
            "better": self.plan.better,
            "sampler": search.sampler,
            "seed": search.seed,
            "round": search.round,
            "planned": search.trials,
            "space": {key: _kind(values) for key, values in search.space.items()},
            "trials": rows,
            "importance": importances(search.space, self.plan.better, told),
            "best": best(rows, self.plan.better),
            "failed": [{"cell": name, "message": message} for name, message in sorted(failed.items())],
        }

    def _row(self, trial: Trial) -> dict[str, Any] | None:
        outcome, cell = self.outcome(trial), self.cell(trial)
        if outcome is None:
            return None
        state = REFUSED if cell is None else ENDED if outcome.value is not None else DIVERGED
        row = {"trial": trial.number, "state": state, "value": outcome.value, "values": trial.values}
        cost: dict[str, Any] = {"params": None, "steps": 0, "tokens": 0, "flops": 0.0}
        if trial.variant:
            facts, costs = trial.variant.facts, trial.variant.costs
            cost["params"] = costs["total_params"]
            if trial.first == trial.number:
                # One that diverged has spent no more than what was planned.
                cost["steps"] = outcome.curve[-1][0] if outcome.curve else facts["steps"] or 0
                cost["tokens"] = cost["steps"] * facts["tokens_per_step"]
                cost["flops"] = cost["tokens"] * costs["flops"]
        same = None if trial.first == trial.number else trial.first
        return {**row, **cost, "same_as": same, "why": trial.refused, "cell": cell and cell.name}


def _kind(values: Range | Choice) -> dict[str, Any]:
    if isinstance(values, Range):
        return {"text": str(values), "log": values.log, "ends": [values.low, values.high], "choices": None}
    return {"text": str(values), "choices": list(values.values.values())}


def best(rows: Sequence[Mapping[str, Any]], better: str) -> int | None:
    """Return the number of the best trial, the first of equals; None: none has a result."""
    sign = 1 if better == "min" else -1
    ended = [(sign * row["value"], row["trial"]) for row in rows if row["value"] is not None]
    return min(ended)[1] if ended else None
