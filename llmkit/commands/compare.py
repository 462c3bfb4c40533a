"""``llmkit compare``: train variants at equal cost, with equal chances and paired seeds, and say what follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least, columns
from llmkit.commands.cell import devices, fit_cell, one_device
from llmkit.commands.fit import run_instead
from llmkit.errors import Problem, UserError, each_note_once, note
from llmkit.run.cli import CLI
from llmkit.run.saving import write_text
from llmkit.study import report
from llmkit.study.cells import StudyPlan
from llmkit.study.execute import Executor, Local, locked
from llmkit.study.gather import gather
from llmkit.study.match import STEPS, WIDTH, Variant, variants
from llmkit.study.outcomes import CELLS, OUTCOME
from llmkit.study.ray import Ray
from llmkit.study.slurm import Slurm
from llmkit.study.spec import Study, read
from llmkit.study.statistics import smallest_difference, special

DESCRIPTION = (
    "Train variants of a config at equal cost and with the same seeds, and report which differences are real. The same "
    "command resumes a study that was stopped."
)
RESULTS = "results.json"


def run(command: str, argv: list[str]) -> int:
    """Run a study; returns the exit code: 1 where a cell failed."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    add = parser.add_argument
    add("--config", help="a study (a YAML file with 'variants'), or the config of an experiment, with --vary")
    add("--vary", metavar="KEY=A,B", help="the variants: a key and its values, the first of which is the baseline")
    add("--seeds", type=at_least(1), help="final runs of each variant; default 6")
    add("--match", help="what all variants are made equal in: params (default), flops, time or none")
    add("--also", help="what they are made equal in for a second verdict")
    add("--metric", help="what is compared; default: what decides on the best checkpoint")
    add("--margin", type=float, help="a difference that would not matter")
    add("--workers", type=at_least(1), help="cells that run at once; default: one for each GPU, or 1")
    add("--threads", type=at_least(1), help="CPU threads of each cell; default 1")
    add("--cells_per_gpu", type=at_least(1), help="how many cells share a GPU; default 1")
    add("--executor", help="where cells run: local (default), slurm or ray")
    add("--name", help="of the study; its folder is OUTPUT/NAME")
    add("--output", help="the folder for studies; default: runs")
    add("--plan", action="store_true", help="print variants, costs and cells, and stop")
    add("--cells", action="store_true", help="list the cells that are left in cells.json, for 'llmkit cell', and stop")
    add("--report", metavar="FOLDER", help="write the report of a study's folder again, and stop")
    options, rest = parser.parse_known_args(argv)
    if options.report:
        return _report(Path(options.report))
    other = ("config", "vary", "plan", "cells", "report")
    given = {name: value for name, value in vars(options).items() if name not in other and value is not None}
    special()  # a missing package is noticed before anything runs
    study = read(options.config, options.vary, given, rest)
    with one_device(), each_note_once():  # the base config is read once for each variant
        plan = StudyPlan(study, variants(study, lambda work, words: run_instead(one_process(work), words, command)))
    if not plan.variants[study.baseline].facts["has_validation"]:
        raise UserError("compare needs validation data: see data.validation and data.validation_share")
    print(describe(plan), flush=True)
    if options.cells:
        return _list(plan)
    return 0 if options.plan else _run(plan, executor(plan))


def one_process(work: Callable[[CLI], int]) -> Callable[[CLI], int]:
    """Return ``work`` with a check before it: a cell is one process."""

    def checked(cli: CLI) -> int:
        if cli.trainer.world_size > 1:
            text = f"{cli.trainer.world_size} processes; in a study each run is one process on one device"
            raise UserError(Problem("trainer.devices", text))
        return work(cli)

    return checked


def executor(plan: StudyPlan) -> Executor:
    """Return what runs the cells of a study, on this machine or on others."""
    study, settings = plan.study, dict(plan.study.executor)
    how = (plan.root, study.workers, study.threads, fit_cell)
    match settings.pop("name"):
        case "slurm":
            return Slurm(*how, settings)
        case "ray":
            return Ray(*how, settings.get("address", "auto"), study.cells_per_gpu)
    on_cpu = plan.variants[study.baseline].tree.get("trainer", {}).get("accelerator") == "cpu"
    imports = ["llmkit.commands.preload", *plan.modules()]
    return Local(*how, imports, [] if on_cpu else devices(), study.cells_per_gpu)


def _run(plan: StudyPlan, execute: Executor) -> int:
    folder = plan.study.folder
    try:
        with locked(folder):
            while left := [
                cell for cell in plan.cells() if plan.outcome(cell) is None and cell.name not in execute.failed
            ]:
                execute(left, len(plan.cells()))
                if all(plan.outcome(cell) is None for cell in left):
                    break
            stale = _stale(plan)
            results = gather(plan, execute.failed)
            write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
            report.write(results, folder)
    except BlockingIOError as error:
        raise UserError(
            f"the study {folder} is running already: wait for it, or give this one another --name"
        ) from error
    if stale:
        note(f"{stale} finished cell(s) in {plan.root} belong to another config, data or version, and are not used")
    print(f"\n{report.summary(results)}\n\nreport: {folder / 'report.html'}", flush=True)
    return 1 if execute.failed else 0


def _list(plan: StudyPlan) -> int:
    left = [dataclasses.asdict(cell) for cell in plan.cells() if plan.outcome(cell) is None]
    write_text(plan.study.folder / CELLS, json.dumps(left, indent=1) + "\n")
    print(f"\n{len(left)} cell(s): llmkit cell {plan.study.folder} INDEX, with INDEX from 0 to {len(left) - 1}")
    return 0


def _stale(plan: StudyPlan) -> int:
    """Return the number of finished cells that this study has no use for."""
    known = {plan.root / cell.name for cell in plan.cells()}
    return sum(path.parent not in known for path in plan.root.glob(f"*/*/*/{OUTCOME}"))


def _report(folder: Path) -> int:
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--report {folder}: no study's {RESULTS} there") from error
    report.write(results, folder)
    print(f"{report.summary(results)}\n\nreport: {folder / 'report.html'}")
    return 0


def describe(plan: StudyPlan) -> str:
    """Return what a study is going to do: the variants with their costs, the cells, and what it could see."""
    study = plan.study
    rows = [["variant", "parameters", "MFLOPs a token", "cache KiB", "matched by", "difference"]]
    rows += [_row(variant.name, variant, study) for variant in plan.variants.values()]
    also = [variant.also for variant in plan.variants.values() if variant.also and variant.also.tree != variant.tree]
    rows += [_row(f"{variant.name}, by {study.also}", variant, study) for variant in also]
    lines = columns(rows)
    lines += [f"  {variant.name}: {text}" for variant in plan.variants.values() for text in variant.notes]
    cells = plan.cells()
    done = sum(plan.outcome(cell) is not None for cell in cells)
    facts = plan.variants[study.baseline].facts
    settings = len(plan.settings()) - (study.also is not None)
    final = study.seeds * (len(plan.variants) * settings + len(also))
    count = f"{final} final cells" if not study.tune else f"{len(cells)} cells so far, then {final} final ones"
    matched = f"{study.match}, then by {study.also}" if study.also else study.match
    lines.append(f"\n{count} ({done} done), matched by {matched}; compared: {plan.metric} at the last step")
    if facts["steps"] is not None:
        each, which = facts["tokens_per_step"], " of the baseline" if study.match == "time" else ""
        runs = [(one.costs["flops"], one.matched.get(STEPS, facts["steps"])) for one in plan.variants.values()]
        flops = each * study.seeds * sum(cost * steps for cost, steps in runs)
        tokens = f"{facts['steps'] * each:,} tokens a cell{which}"
        lines.append(f"{tokens}; {flops:.2g} FLOPs in all final cells of one setting")
    if study.seeds > 1:
        least = smallest_difference(study.seeds, len(plan.variants) - 1)
        lines.append(
            f"{study.seeds} seeds see differences of {least:.2g} standard deviations of the paired difference, or more"
        )
    return "\n".join(lines)


def _row(title: str, variant: Variant, study: Study) -> list[str]:
    costs: dict[str, Any] = variant.costs
    cache = f"{costs['cache'] / 1024:,.3g}" if costs.get("cache") else "-"
    how = {WIDTH: "feedforward x{:.3g}", STEPS: "{:,} steps"}
    width = next((how[key].format(value) for key, value in variant.matched.items()), "as is")
    left = "baseline" if variant.name == study.baseline else f"{variant.left:+.2%}"
    return [title, f"{costs['params']:,.0f}", f"{costs['flops'] / 1e6:.3g}", cache, width, left]
