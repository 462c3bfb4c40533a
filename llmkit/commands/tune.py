"""``llmkit tune``: search settings by trials that Optuna suggests, and write the best config."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmkit.commands import Parser, at_least, columns
from llmkit.commands.cell import one_device
from llmkit.commands.compare import executor, one_process
from llmkit.commands.config.show import effective
from llmkit.commands.fit import run_instead
from llmkit.errors import UserError, each_note_once, note
from llmkit.run.saving import write_text
from llmkit.study.execute import Executor, locked
from llmkit.study.outcomes import OUTCOME
from llmkit.study.search import report
from llmkit.study.search.spec import SAMPLERS, read
from llmkit.study.search.suggest import Suggester, optuna_part
from llmkit.study.search.trials import Trial, Trials

DESCRIPTION = (
    "Search the values of keys of a config by trials that Optuna suggests, and write the best config. The same command "
    "resumes a search that was stopped."
)
CHANGES_TEXT = ("data.tokenizer", "data.validation", "data.validation_share", "model.context", "data.train")


def run(command: str, argv: list[str]) -> int:
    """Run a search; returns the exit code: 1 where a run failed."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    add = parser.add_argument
    add("--config", help="a study (a YAML file with 'base' and 'space'; docs/tuning.md)")
    add("--trials", type=at_least(1), help="how many configs are tried; default 20")
    add("--sampler", help=f"what suggests them: {', '.join(SAMPLERS)}; default tpe")
    add("--seed", type=at_least(0), help="of the sampler; default 0")
    add("--round", type=at_least(1), help="trials suggested at once; default 4")
    add("--metric", help="what is made better; default: what decides on the best checkpoint")
    add("--workers", type=at_least(1), help="runs at once; default: one for each GPU, or 1")
    add("--threads", type=at_least(1), help="CPU threads of each run; default 1")
    add("--cells_per_gpu", type=at_least(1), help="how many runs share a GPU; default 1")
    add("--executor", help="where runs happen: local (default), slurm or ray")
    add("--name", help="of the study; its folder is OUTPUT/NAME")
    add("--output", help="the folder for studies; default: runs")
    add("--plan", action="store_true", help="print the space, the first round and its cost, and stop")
    add("--report", metavar="FOLDER", help="write the report of a study's folder again, and stop")
    options, rest = parser.parse_known_args(argv)
    if options.report:
        return _report(Path(options.report))
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("config", "plan", "report") and value is not None
    }
    optuna_part()  # a missing package is noticed before anything runs
    with each_note_once():  # the base config is read once for each value that is checked, and each trial
        search = read(options.config, given, rest)

        def build(work: Callable[[Any], int], words: list[str]) -> int:
            with one_device():
                return run_instead(one_process(work), words, command)

        trials = Trials(search, build)
        if not trials.base.facts["has_validation"]:
            raise UserError("tune needs validation data: see data.validation and data.validation_share")
        if changing := [key for key in search.space if key.startswith(CHANGES_TEXT)]:
            note(f"{', '.join(changing)}: trials differ in their data or validation text, which may alter the metric")
        suggester = Suggester(search.space, search.sampler, search.seed, trials.plan.better)
        if options.plan:
            print(describe(trials, suggester.ask(min(search.round, search.trials))))
            return 0
        return _run(trials, suggester)


def _run(trials: Trials, suggester: Suggester) -> int:
    search, execute, complete = trials.search, None, True
    try:
        with locked(search.folder):
            while complete and (left := search.trials - len(trials.all)):
                asked = [trials.add(values) for values in suggester.ask(min(search.round, left))]
                execute = _run_round(trials, asked, execute)
                outcomes = [trials.outcome(trial) for trial in asked]
                found = [outcome.value for outcome in outcomes if outcome is not None]
                if complete := len(found) == len(asked):
                    suggester.tell(found)
            results = trials.gather(execute.failed if execute else {})
            if results["best"] is not None:
                results["config"] = _config(trials, trials.all[results["best"]])
            write_text(search.folder / report.RESULTS, json.dumps(results, indent=1) + "\n")
            report.write(results, search.folder)
    except BlockingIOError as error:
        raise UserError(f"the study {search.folder} is running already: wait for it, or give another --name") from error
    known = {trials.plan.root / cell.name for cell in map(trials.cell, trials.all) if cell}
    if stale := sum(path.parent not in known for path in trials.plan.root.glob(f"*/*/*/{OUTCOME}")):
        root = trials.plan.root
        note(f"{stale} finished cell(s) in {root} belong to another config, data or version, and are not used")
    print(f"{report.summary(results)}\n\nreport: {search.folder / 'report.html'}", flush=True)
    return 0 if complete else 1


def _run_round(trials: Trials, asked: Sequence[Trial], execute: Executor | None) -> Executor | None:
    """Run the trials of a round that have not ended; returns what runs them."""
    cells = [trials.cell(trial) for trial in asked if trials.outcome(trial) is None]
    if left := [cell for cell in dict.fromkeys(cells) if cell]:
        execute = execute or executor(trials.plan)
        execute(left, len(left) + sum(trials.outcome(trial) is not None for trial in trials.all))
    return execute


def _config(trials: Trials, trial: Trial) -> str:
    """Return the config of a trial as YAML, with the seed that it was trained with."""
    cell = trials.cell(trial)
    assert trial.variant is not None and cell is not None
    return effective([*trial.variant.words, f"--seed={cell.seed}", f"--name={trials.search.name}-best"], "tune")


def _report(folder: Path) -> int:
    try:
        results = json.loads((folder / report.RESULTS).read_text(encoding="utf-8"))
        results["importance"], results["space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--report {folder}: no {report.RESULTS} of a search there") from error
    report.write(results, folder)
    print(f"{report.summary(results)}\n\nreport: {folder / 'report.html'}")
    return 0


def describe(trials: Trials, first: Sequence[dict[str, Any]]) -> str:
    """Return what a search is going to do: its space, its cost, and the first round."""
    search, base = trials.search, trials.base
    lines = columns([["key", "values"], *([key, str(values)] for key, values in search.space.items())])
    side = "lowest" if trials.plan.better == "min" else "highest"
    rounds = f"in rounds of {search.round}" if search.round < search.trials else "in one round"
    lines.append(f"\n{search.trials} trials {rounds}, suggested by {search.sampler}; {side} {trials.plan.metric} wins")
    if (steps := base.facts["steps"]) is not None:
        tokens = steps * base.facts["tokens_per_step"]
        flops = tokens * base.costs["flops"]
        lines.append(
            f"as the base config: {tokens:,} tokens and {flops:.2g} FLOPs a trial, {flops * search.trials:.2g} in all"
        )
    rows = [[str(number), *map(report.shown, values.values())] for number, values in enumerate(first)]
    return "\n".join([*lines, "\nfirst round:", *columns([["trial", *search.space], *rows])])
