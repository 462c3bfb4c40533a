"""When and how checkpoints are written: each file whole or not at all, and the last good one is never lost."""

from __future__ import annotations

import contextlib
import math
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
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging

from llmkit.checkpoint.content import read
from llmkit.errors import Problem, UserError, note
from llmkit.lightning import can_resume_here, is_debug_run
from llmkit.model.language_model import LanguageModel
from llmkit.model.step import local_shard
from llmkit.run.folder import run_folder

PART = ".part"
"""Suffix of a file that is being written; what a killed run leaves behind is never taken for a checkpoint."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write ``path`` atomically: ``write`` fills a temporary file next to it, which then replaces it.

    Whenever the process or the machine stops, ``path`` is the old file or the new one. Raises what ``write`` raises,
    with the old file untouched; an OSError, the disk being full, say, names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        write(part)
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # flush the new name as well
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what the file raised
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_whole(path, write)


class WholeFileIO(TorchCheckpointIO):
    """Writes checkpoints in local folders atomically; other storage is left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Raises OSError, with the file's name, when the disk is full."""

        def write(part: Path) -> None:
            with part.open("wb") as file:  # given a path, torch would hide the number of an OSError
                torch.save(checkpoint, file)

        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(Path(path), write)


def use_whole_files(trainer: pl.Trainer) -> None:
    """Have a trainer write checkpoints atomically, unless it was given a plugin for that."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileIO()


def save_model(model: LanguageModel, path: Path) -> None:
    """Write the checkpoint of a model that no run has trained: without optimizer state, to be used or begun with."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    use_whole_files(trainer)
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)


class Checkpoints(Checkpoint):
    """Writes the checkpoints of a run: ``last.ckpt``, the best one by the head's metric, and the newest by step.

    They are written at each validation, at the end of training and, with ``every_n_steps``, between validations.
    ``best.ckpt`` and ``step_N.ckpt`` are hard links to what was ``last.ckpt`` then, so they cost no writing. A resumed
    run takes the best checkpoint so far into its own folder.

    Args:
        every_n_steps: optimizer steps between two checkpoints, in addition to those at validations; None: only those.
        keep: how many of the newest checkpoints to keep as ``step_N.ckpt``, next to ``last.ckpt`` and ``best.ckpt``.
        patience: early stopping: training ends after this many validations in a row without a better value of the
            head's metric; None: it does not.

    Raises:
        UserError: a number is out of range; or weights are not finite, which never replace a checkpoint.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 0, patience: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(Problem("checkpoint.every_n_steps", f"must be at least 1, got {every_n_steps}"))
        if patience is not None and patience < 1:
            raise UserError(Problem("checkpoint.patience", f"must be at least 1, got {patience}"))
        if keep < 0:
            raise UserError(Problem("checkpoint.keep", f"must be 0 or more, got {keep}"))
        self.every_n_steps, self.keep, self.patience = every_n_steps, keep, patience
        self.folder = Path()
        self.best_step: int | None = None
        self.best_score = float("nan")
        self.waited = 0
        self._stored_folder = ""
        self._saved_step = -1

    @property
    def best_model_path(self) -> str:
        """The best checkpoint, or an empty string when there is none."""
        return str(self.folder / "best.ckpt") if self.best_step is not None else ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run's folder, and have its checkpoints written atomically."""
        use_whole_files(trainer)
        self.folder = trainer.strategy.broadcast(run_folder(trainer) / "checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what killed runs left, and take over the best checkpoint of a resumed run."""
        # A run that had been stopped early has no step left: its checkpoint is written at the end.
        self._saved_step = -1 if self._stop_early(trainer) else trainer.global_step
        if trainer.is_global_zero:
            sweep(self.folder.parent.parent)
        self._take_over_best(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the checkpoint of a resumed run that had no step left: ``on_train_start`` was never called."""
        resumed = trainer.ckpt_path
        if self._saved_step < 0 and resumed is not None and not is_debug_run(trainer):
            if trainer.is_global_zero and Path(resumed).is_file():
                _link(Path(resumed), self.folder / "last.ckpt")
            self._take_over_best(trainer)

    def _take_over_best(self, trainer: pl.Trainer) -> None:
        """Link the best checkpoint so far into the folder of a resumed run; forget it where its file is gone."""
        best = self.folder / "best.ckpt"
        if self.best_step is None or best.exists():
            return
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            resumed = Path(trainer.ckpt_path)
            sources = [folder / "best.ckpt" for folder in (resumed.parent, Path(self._stored_folder))]
            if self.best_step == trainer.global_step:
                sources = [resumed]
            source = next((path for path in sources if _step_of(path) == self.best_step), None)
            if source is not None:
                _link(source, best)
        if not trainer.strategy.broadcast(best.exists()):
            self.best_step = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Save between validations: once a multiple of ``every_n_steps`` was passed since the last save.

        With 3, and the last save at step 4: at step 6, or one batch later if no run can be resumed there.
        """
        every = self.every_n_steps
        if every and trainer.global_step // every > self._saved_step // every and can_resume_here(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and record whether this is the best checkpoint so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or is_debug_run(trainer):
            return
        assert isinstance(pl_module, LanguageModel)
        name, mode = pl_module.head.monitor
        score = trainer.callback_metrics.get(f"val_{name}")
        value = float("nan") if score is None else float(score)
        better = value < self.best_score if mode == "min" else value > self.best_score
        improved = better or (self.best_step is None and not math.isnan(value))
        if improved:
            self.best_score, self.best_step = value, trainer.global_step
        self.waited = 0 if improved else self.waited + 1
        self.save(trainer, improved)
        self._stop_early(trainer)

    def _stop_early(self, trainer: pl.Trainer) -> bool:
        if self.patience is None or self.waited < self.patience:
            return False
        trainer.should_stop = True
        if trainer.is_global_zero:
            note(
                f"step {trainer.global_step}: training stops, {self.waited} validation(s) in a row were not better "
                f"than that of step {self.best_step} (checkpoint.patience)"
            )
        return True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last steps, and weights that were replaced by an average after the last step."""
        averaged = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if (averaged or trainer.global_step != self._saved_step) and not is_debug_run(trainer):
            self.save(trainer)

    def save(self, trainer: pl.Trainer, best: bool = False) -> None:
        """Write ``last.ckpt`` and its links. Raises UserError, with the old file untouched, for infinite weights."""
        last, step = self.folder / "last.ckpt", trainer.global_step
        finite = all(bool(torch.isfinite(local_shard(p)).all()) for p in trainer.lightning_module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise UserError(f"step {step}: the weights are not finite; {last} was not overwritten")
        trainer.save_checkpoint(last)
        self._saved_step = step
        if trainer.is_global_zero:
            if best:
                _link(last, self.folder / "best.ckpt")
            if self.keep:
                _link(last, self.folder / f"step_{step}.ckpt")
                self._prune(step)

    def _prune(self, newest: int) -> None:
        names = (re.fullmatch(r"step_(\d+)\.ckpt", path.name) for path in self.folder.iterdir())
        steps = sorted(int(name[1]) for name in names if name)
        for step in steps[: -self.keep]:
            if step != newest:  # a rerun in this folder may have saved later steps before
                (self.folder / f"step_{step}.ckpt").unlink()

    def state_dict(self) -> dict[str, Any]:
        """Return which checkpoint is the best, how many validations were not better since, and the folder."""
        return {
            "best_step": self.best_step,
            "best_score": self.best_score,
            "waited": self.waited,
            "folder": str(self.folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoint of the run that is resumed."""
        self.best_step, self.best_score = state_dict["best_step"], state_dict["best_score"]
        self.waited, self._stored_folder = state_dict.get("waited", 0), state_dict["folder"]


def sweep(folder: Path) -> None:
    """Remove the unfinished files that killed runs left in ``folder/version_*/checkpoints``."""
    for path in folder.glob(f"version_*/checkpoints/*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:  # a younger file may belong to a run that is writing it
                path.unlink()


def _link(path: Path, name: Path) -> None:
    """Make ``name`` a hard link to a file, replacing any old one; a copy where the file system has no hard links."""
    if name.exists() and name.samefile(path):
        return

    def write(part: Path) -> None:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)

    write_whole(name, write)


def _step_of(path: Path) -> int | None:
    """Return the step of a checkpoint; None where it is missing or cannot be read."""
    try:
        return int(read(path)["global_step"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
