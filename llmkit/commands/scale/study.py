"""``llmkit scale``: train models of several sizes, fit the loss by size and tokens, and test a prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least, columns
from llmkit.commands.compare import executor, one_process
from llmkit.commands.fit import run_instead
from llmkit.errors import Problem, UserError, each_note_once, note
from llmkit.run.saving import write_text
from llmkit.study.cells import StudyPlan
from llmkit.study.execute import Executor, locked
from llmkit.study.match import better_side
from llmkit.study.outcomes import OUTCOME, Cell
from llmkit.study.scaling import grid, report, sentences, trunk
from llmkit.study.scaling.analysis import analyse, predictions
from llmkit.study.scaling.gather import ended, foreseen, runs_of
from llmkit.study.scaling.grid import Point, Size
from llmkit.study.scaling.runs import check
from llmkit.study.scaling.spec import ScaleStudy, read
from llmkit.study.scaling.surface import scipy_part
from llmkit.study.scaling.trunk import Trunks
from llmkit.study.spec import Tune

DESCRIPTION = (
    "Train models of several sizes for several budgets, fit the loss as a function of parameters and tokens, and "
    "predict runs before they run. The same command resumes a study that was stopped. 'llmkit scale fit' takes runs "
    "from a table."
)
PREDICTIONS, DRAWS = "predictions.json", 1000


def run(command: str, argv: list[str]) -> int:
    """Run a study of sizes; returns the exit code: 1 where a cell failed."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    add = parser.add_argument
    add("--config", help="a study of sizes (a YAML file; docs/scaling.md)")
    add("--seeds", type=at_least(1), help="runs of each size and budget; default 1")
    add("--workers", type=at_least(1), help="cells that run at once; default: one for each GPU, or 1")
    add("--threads", type=at_least(1), help="CPU threads of each cell; default 1")
    add("--name", help="of the study; its folder is OUTPUT/NAME")
    add("--output", help="the folder for studies; default: runs")
    add("--plan", action="store_true", help="print sizes, budgets, hours and what will be identified, and stop")
    add("--report", metavar="FOLDER", help="write the report of a study's folder again, and stop")
    options, rest = parser.parse_known_args(argv)
    if options.report:
        return _report(Path(options.report))
    other = ("config", "plan", "report")
    given = {name: value for name, value in vars(options).items() if name not in other and value is not None}
    scipy_part("optimize")  # a missing package is noticed before anything runs
    study = read(options.config, given, rest)
    with each_note_once():

        def build(work: Any, words: list[str]) -> int:
            return run_instead(one_process(work), words, command)

        sizes = grid.sizes(study, build)
        facts = sizes[0].built.facts
        if not facts["has_validation"]:
            raise UserError("scale needs validation data: see data.validation and data.validation_share")
        if better_side(study.metric, facts["sides"]) != "min":
            raise UserError(Problem("metric", f"{study.metric} is not a loss: a surface is fitted to one"))
        points = grid.points(study, sizes)
        held = grid.held_out(study, sizes)
        for name in study.variants:  # before anything is spent
            own = [(point, "", 1.0, None) for point in points if point.size.variant == name]
            check(runs_of(own * study.seeds, by_budget=False))
        if study.schedule == "trunk":
            trunk.check(study, [*points, *held])
        if options.plan:
            grid.timed(sizes, build)
        print(describe(study, sizes, points, held), flush=True)
        return 0 if options.plan else _run(study, points, held)


class _Stages:
    """The cells of a study, stage by stage: those that tune, the grid, and what is held out."""

    def __init__(self, study: ScaleStudy) -> None:
        self.study, self.cells = study, list[Cell]()
        self.failed: dict[str, str] = {}
        self.lost: set[str] = set()
        """Cells whose trunk has diverged."""
        self.tuned: list[dict[str, Any]] = []
        self._execute: Executor | None = None

    def run(self, plan: StudyPlan, cells: Sequence[Cell]) -> bool:
        """Run cells; returns whether all have ended."""
        self.cells += [cell for cell in cells if cell not in self.cells]
        left = [cell for cell in cells if plan.outcome(cell) is None and cell.name not in self.failed]
        if left:
            self._execute = self._execute or executor(plan)
            self._execute(left, len(cells))
            self.failed |= self._execute.failed
        return all(plan.outcome(cell) is not None for cell in cells)

    def train(self, plan: StudyPlan, points: Sequence[Point], trunks: Trunks | None) -> None:
        """Run the cells of points, and the trunks that they need before them."""
        final = [cell for name in plan.variants for cell in plan.final(name, "base").values()]
        for wave in [final] if trunks is None else trunks.waves(points, plan):
            ready = []
            for cell in wave:
                match "diverged" if cell.begins in self.lost else trunks and trunks.usable(cell):
                    case "diverged":
                        self.lost.add(cell.name)
                    case "failed":
                        self.failed[cell.name] = f"its trunk, {cell.begins}, has not ended"
                    case _:
                        ready.append(cell)
            self.run(plan, ready)

    def runs_lost(self) -> list[str]:
        """Return the runs whose trunk has diverged."""
        return sorted(name for name in self.lost if name.startswith("final/"))

    def rates(self, points: list[Point]) -> dict[str, Any]:
        """Tune the learning rate at two sizes of each variant, and return the rule of each.

        Raises UserError if all values diverge or a cell fails.
        """
        tune = self.study.learning_rate
        if not isinstance(tune, Tune):
            return {}
        at = grid.tuning_points(self.study, points)
        plan = grid.planned(self.study, [point for two in at.values() for point in two], {}, tune)
        while True:
            cells = [cell for name in plan.variants for cell in plan.tuning(name)]
            if not self.run(plan, cells):
                raise UserError(f"tuning failed: {'; '.join(self.failed.values())}")
            if len(cells) == len([cell for name in plan.variants for cell in plan.tuning(name)]):
                break
        rules = {}
        for variant, two in at.items():
            found = {}
            for point in two:
                value, at_edge = plan.chosen(point.name)
                if value is None:
                    raise UserError(f"tuning failed: all learning rates of {point.name} diverge")
                found[point.size.params] = value
                self.tuned.append({"point": point.name, "value": value, "at_edge": at_edge})
            rules[variant] = grid.interpolated(found)
        return rules


def _run(study: ScaleStudy, points: list[Point], held: list[Point]) -> int:
    stages = _Stages(study)
    try:
        with locked(study.folder):
            rates = stages.rates(points)
            plan = grid.planned(study, points, rates)
            trunks = Trunks(study, [*points, *held], rates) if study.schedule == "trunk" else None
            stages.train(plan, points, trunks)
            runs, lost = _gathered(study, plan, points)
            outside = None
            if held:
                later = grid.planned(study, held, rates)
                _predict(study, runs, held)
                stages.train(later, held, trunks)
                outside, more = _gathered(study, later, held)
                lost += more
            failed = [f"{name}: {text}" for name, text in sorted(stages.failed.items())]
            results = analyse(
                runs,
                study.name,
                DRAWS,
                outside,
                learning_rates=stages.tuned,
                schedule=study.schedule,
                failed=[*(f"{name}: diverged" for name in [*lost, *stages.runs_lost()]), *failed],
            )
            report.write(results, study.folder)
    except BlockingIOError as error:
        raise UserError(f"the study {study.folder} is running already: wait for it, or give another --name") from error
    known = {plan.root / cell.name for cell in stages.cells}
    if stale := sum(path.parent not in known for path in plan.root.glob(f"*/*/*/{OUTCOME}")):
        note(f"{stale} finished cell(s) in {plan.root} belong to another config, data or version, and are not used")
    print(f"\n{sentences.summary(results)}\n\nreport: {study.folder / 'report.html'}", flush=True)
    return 1 if stages.failed else 0


def _gathered(study: ScaleStudy, plan: StudyPlan, points: list[Point]) -> tuple[dict[str, Any], list[str]]:
    """Return the runs of each variant, and the names of those that diverged."""
    found = {name: ended(plan, points, name, study.budgets is not None) for name in study.variants}
    return {name: runs for name, (runs, _) in found.items()}, [cell for _, lost in found.values() for cell in lost]


def _predict(study: ScaleStudy, runs: Mapping[str, Any], held: list[Point]) -> None:
    """Write what the grid predicts of the runs that are held out, before they run.

    Raises UserError where too few runs of a variant are left.
    """
    rows = []
    for name, fitted in runs.items():
        check(fitted, f"variant {name}: ")  # cells may have failed
        own = [point for point in held if point.size.variant == name]
        unknown = runs_of([(point, point.name, 1.0, None) for point in own], by_budget=True)
        for point, row in zip(own, predictions(fitted, unknown, DRAWS), strict=True):
            rows.append({"point": point.name, **{key: value for key, value in row.items() if key != "loss"}})
    text = json.dumps(rows, indent=1) + "\n"
    file = study.folder / PREDICTIONS
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)


def _report(folder: Path) -> int:
    try:
        results = json.loads((folder / report.RESULTS).read_text(encoding="utf-8"))
        results["variants"], results["multipliers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--report {folder}: no {report.RESULTS} of scaling laws there") from error
    report.write(results, folder)
    print(f"{sentences.summary(results)}\n\nreport: {folder / 'report.html'}")
    return 0


def describe(study: ScaleStudy, sizes: Sequence[Size], points: Sequence[Point], held: Sequence[Point]) -> str:
    """Return what a study is going to do: sizes, budgets, tokens, FLOPs, hours, and what it could show."""
    rows = [["size", "layers", "parameters", "with embeddings", "MFLOPs a token", "seconds a step"]]
    for size in sizes:
        costs = size.built.costs
        counts = [f"{costs[key]:,.0f}" for key in ("params", "total_params")]
        step = "" if size.seconds is None else f"{size.seconds:.3g}"
        layers = str(size.built.tree["model"]["num_layers"])
        rows.append([f"{size.variant}, {size.width}", layers, *counts, f"{costs['flops'] / 1e6:.3g}", step])
    lines = [*columns(rows), ""]
    unit = "FLOPs" if study.budgets is not None else "tokens a parameter"
    rows = [[unit, "runs", "widths", "steps", "tokens a parameter", "epochs", "FLOPs in all"]]
    for some, kind in ((points, ""), (held, " (held out)")):
        for target in dict.fromkeys(point.target for point in some):
            own = [point for point in some if point.target == target]
            cells = [
                *(_span([p.size.width for p in own]), _span([p.steps for p in own])),
                *(_span([p.tokens / p.size.params for p in own]), _span([p.epochs for p in own if p.epochs])),
            ]
            total = study.seeds * sum(point.flops for point in own)
            rows.append([f"{target:.3g}{kind}", str(study.seeds * len(own)), *cells, f"{total:.2g}"])
    lines += [*columns(rows), ""]
    everything = study.seeds * [*points, *held]
    text = f"{len(everything)} runs"
    if study.schedule == "trunk":
        alone = sum(point.flops for point in everything)
        text += f", decays of {study.seeds * len(sizes)} trunks (runs of their own would be {alone:.2g} FLOPs)"
        everything = study.seeds * trunk.parts([*points, *held])
    text += f", {sum(point.flops for point in everything):.2g} FLOPs"
    if isinstance(study.learning_rate, Tune):
        at = [point for two in grid.tuning_points(study, [*points]).values() for point in two]
        tuning = int(study.learning_rate.points * study.learning_rate.seeds)
        more = tuning * sum(point.flops for point in at)
        text += f", and {tuning * len(at)} that tune the learning rate, {more:.2g} FLOPs"
        everything += tuning * at
    if all(size.seconds is not None for size in sizes):
        hours = sum(point.steps * (point.size.seconds or 0) for point in everything) / 3600
        text += f"; about {hours:.2g} hours, one run at a time, without validation"
    lines.append(text)
    if study.learning_rate is None:
        lines.append(
            "one learning rate for all sizes: too high for large ones, it looks like an exponent (learning_rate)"
        )
    for name in study.variants:
        own = [point for point in points if point.size.variant == name]
        first, *rest = foreseen(study, own)
        lines += [f"{name}: {first}", *rest]
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
