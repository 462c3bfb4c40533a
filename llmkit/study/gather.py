"""The results of a study as plain data: what the report is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmkit
from llmkit.study.cells import StudyPlan, base_value, tuning_seeds
from llmkit.study.outcomes import Cell, Outcome


def gather(plan: StudyPlan, failed: dict[str, str]) -> dict[str, Any]:
    """Return everything that the cells have found so far. It depends on nothing but the study and its cells' folders.

    Args:
        plan: the study's cells.
        failed: the message of each cell that failed.
    """
    study = plan.study
    facts = plan.variants[study.baseline].facts
    shown = ("steps", "tokens_per_step", "context", "precision")
    tune = study.tune
    return {
        "name": study.name,
        "llmkit": llmkit.__version__,
        "base": ", ".join(Path(word.partition("=")[2]).name for word in study.base if word.startswith("--config=")),
        "options": [word for word in study.base if not word.startswith("--config=")],
        "metric": plan.metric,
        "better": plan.better,
        "margin": study.margin,
        "baseline": study.baseline,
        "match": study.match,
        "also": study.also,
        "data": {key: facts[key] for key in shown if facts[key] is not None},
        "seeds": list(range(study.seeds)),
        "tuned": None if tune is None else {"key": tune.key, "factor": tune.factor, "seeds": list(tuning_seeds(tune))},
        "variants": {name: _variant(plan, name) for name in plan.variants},
        "failed": [{"cell": name, "message": message} for name, message in sorted(failed.items())],
    }


def _variant(plan: StudyPlan, name: str) -> dict[str, Any]:
    variant, tune = plan.variants[name], plan.study.tune
    finals = {setting: _ended(plan, plan.final(name, setting)) for setting in plan.settings()}
    chosen, at_edge = plan.chosen(name)
    return {
        "overrides": plan.study.variants[name],
        "matched": variant.matched,
        "left": variant.left,
        "costs": variant.costs,
        "notes": variant.notes,
        "also": variant.also and {name: getattr(variant.also, name) for name in ("matched", "left", "notes", "costs")},
        "base_value": base_value(variant, tune) if tune else None,
        "tuning": [{"value": v, "results": plan.tried(name, v)} for v in plan.values(name)] if tune else None,
        "chosen": chosen,
        "at_edge": at_edge,
        "runs": {setting: {seed: run.value for seed, run in runs.items()} for setting, runs in finals.items()},
        "curves": {setting: {seed: run.curve for seed, run in runs.items()} for setting, runs in finals.items()},
    }


def _ended(plan: StudyPlan, cells: dict[int, Cell]) -> dict[str, Outcome]:
    """Return what became of those cells that have ended, by seed."""
    outcomes = {str(seed): plan.outcome(cell) for seed, cell in cells.items()}
    return {seed: outcome for seed, outcome in outcomes.items() if outcome is not None}
