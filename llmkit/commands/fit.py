"""``llmkit fit | validate | test | predict``: check the config, then let LightningCLI run it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from llmkit.checkpoint.content import Stored
from llmkit.config.plan import Plan, plan
from llmkit.data import cache
from llmkit.errors import note
from llmkit.lightning import has_ended
from llmkit.run.cli import CLI, filled_in
from llmkit.run.process import LOGGERS, as_found
from llmkit.run.record import RESULTS
from llmkit.run.report import report_finished
from llmkit.testing import first_use

HUSHED = (
    ".*does not have many workers.*",
    ".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    ".*sync_dist=True.. when logging on epoch level.*",  # the metrics are summed over processes already
    ".*Total length of `list` across ranks is zero.*",
    ".*You have overridden `transfer_batch_to_device` in `LightningModule`.*",
    ".*The dirpath has changed from.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*lr_scheduler.step.. before `optimizer.step.*",
)
"""Lightning's hints that a user cannot act on."""
NO_SRUN = ".*srun. command is available on your system but is not used.*"
"""Another one, outside a job of Slurm."""
FIND_LR = "--find_lr"
"""Tries learning rates instead of training."""


def run(command: str, argv: list[str], cli: type[CLI] = CLI, asked: str = "") -> int:
    """Run one of Lightning's commands; returns the exit code.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: the arguments after it.
        cli: what builds and runs it.
        asked: the name in messages, if another command runs this one.

    Raises:
        UserError: every mistake in the config, with its place.
    """
    if {"-h", "--help"} & set(argv):
        cli(command, ["--help"])
        return 0
    if command == "fit" and FIND_LR in argv:
        from llmkit.run.find_lr import OPTIONS, find_lr  # costs what no other run needs

        def suggest(cli: CLI) -> int:
            print(find_lr(cli))
            return 0

        return run_instead(suggest, [*(word for word in argv if word != FIND_LR), *OPTIONS], f"{command} {FIND_LR}")
    planned, trains = plan(command, argv, asked), command == "fit" and not asked
    if not trains or finished(planned) is None:
        start(planned, cli, examines=trains)
    return 0


def start(planned: Plan, cli: type[CLI], examines: bool) -> CLI:
    """Run a plan, leave the process as it was found, and return what ran it.

    Args:
        planned: what to run with.
        cli: what builds and runs it.
        examines: whether plugins are examined first.

    Raises:
        UserError: the config cannot be built, or the run fails for a reason that the user can remove.
        Stopped: a signal ended the run, which has saved.
    """
    with as_found(), planned.placed():
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        for text in [*HUSHED, *([] if "SLURM_JOB_ID" in os.environ else [NO_SRUN])]:
            warnings.filterwarnings("ignore", text)
        if examines:
            examine_plugins(planned.config.tree)
        return cli(planned.command, planned.args, planned.stored)


def finished(planned: Plan) -> Path | None:
    """Return the folder of a run that a fit would resume and that has ended, and print its report; else None."""
    stored = planned.stored
    if stored is None or not _is_finished(stored, planned.config.tree):
        return None
    report_finished(stored)
    return stored.path.parent.parent


def _is_finished(stored: Stored, tree: Mapping[str, Any]) -> bool:
    """Return whether a fit resumes a run that reached its end, and has reported it, with the same model and data."""
    if not (stored.path.parent.parent / RESULTS).is_file():
        return False
    limits = {**tree["trainer"], **filled_in(tree["trainer"])}
    model = {name: value for name, value in stored.part["model"].items() if name not in ("optimizer", "scheduler")}
    optimizers = [part["optimizer"] or {} for part in (stored.part["model"], tree["model"])]
    if len({optimizer.get("class_path", "").rpartition(".")[2] for optimizer in optimizers}) > 1:
        return False  # which is refused
    same = _agree({"model": model, "data": stored.part["config"].get("data", {})}, tree)
    return same and has_ended(stored.content, limits["max_steps"], limits["max_epochs"])


def _agree(one: Any, two: Any) -> bool:
    """Return whether two trees of settings have the same values where both have one."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return all(_agree(one[name], two[name]) for name in one.keys() & two.keys())
    return bool(one == two)


def examine_plugins(config: dict[str, Any]) -> None:
    """Print a note for each plugin of a config that is not llmkit's own and fails the examination at first use."""
    if not config["examine"] or getattr(rank_zero_only, "rank", None):
        return
    for line in first_use.examine(config, cache.root(config["data"]["cache_dir"])):
        note(f"{line} (all checks: llmkit plugins check; --examine false leaves this out)")


def run_instead(work: Callable[[CLI], int], argv: list[str], asked: str) -> int:
    """Build everything that ``fit`` would build, but run ``work`` on it instead of training; returns its exit code."""
    codes = []

    class Instead(CLI):
        def execute(self) -> None:
            codes.append(work(self))

    run("fit", argv, Instead, asked)
    return codes[0]
