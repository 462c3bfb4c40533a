"""``llmkit fit | validate | test | predict``: check the config, then let LightningCLI run it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from llmkit.config.plan import plan
from llmkit.data import cache
from llmkit.errors import note
from llmkit.run.cli import CLI
from llmkit.testing import first_use

HUSHED = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    ".*sync_dist=True.. when logging on epoch level.*",  # the metrics are summed over processes already
    ".*Total length of `list` across ranks is zero.*",
    ".*The dirpath has changed from.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*lr_scheduler.step.. before `optimizer.step.*",
)
"""Lightning's hints that a user cannot act on."""


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
        cli(command, [command, "--help"])
        return 0
    planned = plan(command, argv, asked)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in HUSHED:
        warnings.filterwarnings("ignore", text)
    if command == "fit" and not asked:
        examine_plugins(planned.config.tree)
    with planned.placed():
        cli(command, planned.args, planned.stored)
    return 0


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
        def _run_subcommand(self, subcommand: str) -> None:
            codes.append(work(self))

    run("fit", argv, Instead, asked)
    return codes[0]
