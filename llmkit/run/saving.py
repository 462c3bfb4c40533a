"""When checkpoints are written, and how: a file is there whole or not at all, and the last good one is never lost."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger

from llmkit.checkpoint.content import read
from llmkit.errors import Problem, UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.step import local

PART = ".part"
"""Suffix of a file that is being written; one that a killed run left behind is never taken for a checkpoint."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, and put it in its place once it is on the disk.

    Whenever the process or the machine stops, ``path`` is the old file or the new one. Raises what ``write`` raises,
    with the old file untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        write(part)
        os.replace(part, path)
        if os.name == "posix":  # the new name is on the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


class WholeFileIO(TorchCheckpointIO):
    """Writes checkpoints of local folders whole; other places are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Raises OSError, with the file's name, when the disk is full."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                except (OSError, RuntimeError) as error:
                    # torch wraps what the file raised.
                    cause = error if isinstance(error, OSError) else error.__context__
                    if isinstance(cause, OSError):
                        raise OSError(cause.errno, cause.strerror, str(path)) from error
                    raise

        write_whole(Path(path), write)


def use_whole_files(trainer: pl.Trainer) -> None:
    """Let a trainer write checkpoints whole, unless it was given another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileIO()


class Checkpoints(Checkpoint):
    """Writes the checkpoints of a run: ``last.ckpt``, the best one by the head's metric, and the newest by step.

    All are written at each validation, at the end of training and, where that is asked for, between validations.
    ``best.ckpt`` and ``step_N.ckpt`` are further names of the file that was ``last.ckpt`` then, so they cost no
    writing. A resumed run takes the best one so far into its own folder.

    Args:
        every_n_steps: optimizer steps between two checkpoints, beside those at validations; None: only those.
        keep: how many of the newest checkpoints stay as ``step_N.ckpt``, beside ``last.ckpt`` and ``best.ckpt``.

    Raises:
        UserError: a number out of range; or weights that are not finite, which never replace a checkpoint.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 0) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(Problem("checkpoint.every_n_steps", f"must be at least 1, got {every_n_steps}"))
        if keep < 0:
            raise UserError(Problem("checkpoint.keep", f"must be 0 or more, got {keep}"))
        self.every_n_steps, self.keep = every_n_steps, keep
        self.folder = Path()
        self.best_step: int | None = None
        self.best_score = float("nan")
        self._stored_folder = ""
        self._saved_step = -1
        self._waiting = False

    @property
    def best_model_path(self) -> str:
        """The best checkpoint, or an empty string when there is none."""
        return str(self.folder / "best.ckpt") if self.best_step is not None else ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run's folder, and let its checkpoints be written whole."""
        use_whole_files(trainer)
        self.folder = trainer.strategy.broadcast(run_folder(trainer) / "checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the best checkpoint so far into the folder of a resumed run."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            sweep(self.folder.parent.parent)
        self._take_best_along(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take along what a run was resumed from that had no step left: it never came to its start."""
        resumed, last = trainer.ckpt_path, self.folder / "last.ckpt"
        if self._saved_step < 0 and resumed is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if trainer.is_global_zero and Path(resumed).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                _also(Path(resumed), last)
            self._take_best_along(trainer)

    def _take_best_along(self, trainer: pl.Trainer) -> None:
        """Give the best checkpoint so far a name in the folder of a resumed run."""
        if self.best_step is None or (self.folder / "best.ckpt").exists():
            return
        found = False
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            resumed = Path(trainer.ckpt_path)
            beside = [folder / "best.ckpt" for folder in (resumed.parent, Path(self._stored_folder))]
            for source in [resumed] if self.best_step == trainer.global_step else beside:
                if _step_of(source) == self.best_step:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    _also(source, self.folder / "best.ckpt")
                    found = True
                    break
        if not trainer.strategy.broadcast(found):
            self.best_step = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between validations; where one is due now, that is waited for, and so is the batch after an epoch's end.

        Lightning does not count epochs right when it resumes a run saved between the last batch and the end of one.
        """
        step, every = trainer.global_step, self.every_n_steps
        due = every is not None and step != self._saved_step and (step % every == 0 or self._waiting)
        if not due or validation_is_due(trainer):
            return
        self._waiting = ends_epoch(trainer)
        if not self._waiting:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and note whether this is the best one."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, LanguageModel)
        name, mode = pl_module.head.monitor
        score = trainer.callback_metrics.get(f"val_{name}")
        improved = False
        if score is not None and score == score:
            value = float(score)
            improved = self.best_step is None or (value < self.best_score if mode == "min" else value > self.best_score)
            if improved:
                self.best_score, self.best_step = value, trainer.global_step
        self.save(trainer, improved)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the last steps brought."""
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)

    def save(self, trainer: pl.Trainer, best: bool = False) -> Path:
        """Write ``last.ckpt`` and give it its further names; returns its path."""
        last = self.folder / "last.ckpt"
        step = trainer.global_step
        weights = [local(p) for p in trainer.lightning_module.parameters()]
        finite = all(bool(torch.isfinite(weight).all()) for weight in weights)
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise UserError(f"step {step}: the weights are not finite any more; {last} stays as it was")
        trainer.save_checkpoint(last)
        self._saved_step, self._waiting = step, False
        if trainer.is_global_zero:
            if best:
                _also(last, self.folder / "best.ckpt")
            if self.keep:
                _also(last, self.folder / f"step_{step}.ckpt")
                self._prune(step)
        return last

    def _prune(self, newest: int) -> None:
        found = {
            int(m[1]): path for path in self.folder.iterdir() if (m := re.fullmatch(r"step_(\d+)\.ckpt", path.name))
        }
        for step in sorted(found)[: -self.keep]:
            if step != newest:
                found[step].unlink()

    def state_dict(self) -> dict[str, Any]:
        """Return which checkpoint is the best, and where."""
        return {"best_step": self.best_step, "best_score": self.best_score, "folder": str(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a resumed run knew."""
        self.best_step, self.best_score = state_dict["best_step"], state_dict["best_score"]
        self._stored_folder = state_dict["folder"]


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the training batch that has just ended."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and not loop.epoch_loop.val_loop.skip


def ends_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the training batch that has just ended is the last one of several of an epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and trainer.num_training_batches > 1


def sweep(folder: Path) -> None:
    """Remove the unfinished files that killed runs left in ``folder/version_*/checkpoints``."""
    for path in folder.glob(f"version_*/checkpoints/*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:  # one that still grows belongs to a run that goes on
                path.unlink()


def _also(path: Path, name: Path) -> None:
    """Give a file a further name, replacing what had it before; a copy where the file system has no hard links."""
    if name.exists() and name.samefile(path):
        return

    def write(part: Path) -> None:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            with open(path, "rb") as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())

    write_whole(name, write)


def _step_of(path: Path) -> int | None:
    """Return the step of a checkpoint, None where there is none that can be read."""
    try:
        return int(read(path)["global_step"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.log_dir or trainer.default_root_dir)
