"""The folder of a run, OUTPUT/NAME/version_N: claimed by one run alone, the same on all its processes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from llmkit.errors import Problem, UserError
from llmkit.model.language_model import LanguageModel
from llmkit.run import trackers


def claim(parent: Path) -> int:
    """Create the next folder ``version_N`` below ``parent`` and return N. A number that another run was faster to take
    is left to it.

    Raises UserError where no folder can be created.
    """
    try:
        taken = (re.fullmatch(r"version_(\d+)", path.name) for path in (parent.iterdir() if parent.is_dir() else ()))
        number = 1 + max((int(match[1]) for match in taken if match), default=-1)
        while True:
            try:
                (parent / f"version_{number}").mkdir(parents=True)
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
        super().__init__(output, name)
        self.writes = writes
        self.number: int | None = None
        self.made: list[Path] = []

    @property
    def version(self) -> Any:
        """N of ``version_N``. On other processes than the first it is None until ``RunFolder`` has passed it on."""
        if self.number is None and getattr(rank_zero_only, "rank", 0) == 0:
            parents = [path for path in (Path(self.root_dir), Path(self.save_dir)) if not path.exists()]
            self.number = claim(Path(self.root_dir))
            self.made = [Path(self.root_dir, f"version_{self.number}"), *parents]
        return self.number

    def release(self) -> None:
        """Remove the folder, and those above it that were made for it, if nothing was put into them."""
        with suppress(OSError):
            for path in self.made:
                path.rmdir()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write a row."""
        if self.writes:
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: ``config.yaml`` holds them."""


@contextmanager
def unlogged(trainer: pl.Trainer) -> Iterator[None]:
    """Log nothing within the block; the run keeps its folder."""
    loggers = trainer.loggers
    own = [logger for logger in loggers if isinstance(logger, RunLogger)]
    wrote = [logger.writes for logger in own]
    try:
        trainer.loggers = list[Logger](own)
        for logger in own:
            logger.writes = False
        yield
    finally:
        trainer.loggers = loggers
        for logger, writes in zip(own, wrote, strict=True):
            logger.writes = writes


class RunFolder(Callback):
    """Makes all processes of a run use the folder that the first one has claimed; the first callback of a trainer.

    It gives the config to all loggers, as hyperparameters. The ``metrics.csv`` of a resumed run, and what TensorBoard
    shows, begin with the rows of the run before it, up to the checkpoint; other trackers continue that run.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.resumed = ""
        self._to_copy = True
        self._loggers: list[Logger] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the folder's number on."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.number = trainer.strategy.broadcast(logger.version)
        if stage == "fit":
            self.folder, self._loggers = run_folder(trainer), trainer.loggers

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the config."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.is_global_zero:
            trackers.describe(trainer.loggers, dict(flat(pl_module.config)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the earlier rows."""
        if not self._to_copy or trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        self._to_copy = False
        places = (Path(trainer.ckpt_path).parent.parent, Path(self.resumed))
        file = next((path / "metrics.csv" for path in places if (path / "metrics.csv").is_file()), None)
        for logger in trainer.loggers:
            if file is not None and isinstance(logger, RunLogger | TensorBoardLogger):
                for step, row in rows_before(file, trainer.global_step):
                    # As text, so that nothing is rounded; TensorBoard takes numbers.
                    values: Any = row if isinstance(logger, RunLogger) else {k: float(v) for k, v in row.items()}
                    logger.log_metrics(values, step)
                logger.save()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy them before the validation of a run that had no step left."""
        if trainer.state.fn == "fit":
            self.on_train_start(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy them in a run that had nothing left."""
        self.on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the folder, and what trackers know the run by."""
        known = trackers.ids(self._loggers)
        return {"folder": str(self.folder.absolute()), **({"trackers": known} if known else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the folder of the run that is resumed."""
        self.resumed = state_dict["folder"]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a config and their values, as people write them.

    ``{model: {attention: {class_path: a.Lstm, init_args: {num_heads: 2}}}}`` has ``model.attention`` Lstm and
    ``model.attention.num_heads`` 2.
    """
    for name, value in config.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            yield key, str(value) if isinstance(value, list) else value
        elif "class_path" in value:
            yield key, str(value["class_path"]).rpartition(".")[2]
            yield from flat(value.get("init_args") or {}, f"{key}.")
        else:
            yield from flat(value, f"{key}.")


def rows_before(file: Path, step: int) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a ``metrics.csv`` before an optimizer step, each with its step; none where it is damaged."""
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = [(int(row.pop("step")), row) for row in csv.DictReader(handle)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return [(at, {name: value for name, value in row.items() if name and value}) for at, row in rows if at < step]


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.log_dir or trainer.default_root_dir)
