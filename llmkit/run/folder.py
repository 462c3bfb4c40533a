"""The folder of a run, OUTPUT/NAME/version_N: claimed by one run alone, the same on all its processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llmkit.errors import Problem, UserError


def claim(parent: Path) -> int:
    """Create the next folder ``version_N`` below ``parent`` and return N. A number that another run was faster to take
    is left to it.

    Raises UserError where no folder can be created.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = (re.fullmatch(r"version_(\d+)", path.name) for path in parent.iterdir())
        number = 1 + max((int(match[1]) for match in taken if match), default=-1)
        while True:
            try:
                (parent / f"version_{number}").mkdir()
                return number
            except FileExistsError:
                number += 1
    except OSError as error:
        text = f"no folder can be created in {parent}: {error.strerror}"
        raise UserError(Problem("output", text)) from error


class RunLogger(CSVLogger):
    """Claims the folder of a run when it is first asked for, and writes ``metrics.csv`` into it.

    Args:
        output: the folder for all runs.
        name: of the experiment.
        writes: whether there is a ``metrics.csv``; the folder is claimed in any case.
    """

    def __init__(self, output: str, name: str, writes: bool = True) -> None:
        super().__init__(output, name, flush_logs_every_n_steps=1)
        self.writes = writes
        self.number: int | None = None

    @property
    def version(self) -> Any:
        """N of ``version_N``. On other processes than the first it is None until ``RunFolder`` has passed it on."""
        if self.number is None and rank_zero_only.rank == 0:
            self.number = claim(Path(self.root_dir))
        return self.number

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write a row."""
        if self.writes:
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: ``config.yaml`` holds them."""


class RunFolder(Callback):
    """Makes all processes of a run use the folder that the first one has claimed; the first callback of a trainer."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the folder's number on."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.number = trainer.strategy.broadcast(logger.version)


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.log_dir or trainer.default_root_dir)
