"""Lightning's private corners, each behind a function that says what it means: what to look at when Lightning changes.

Lightning's loops keep the counters that exact resume needs, but have no public interface. Nothing else in llmkit reads
them; tests/test_lightning.py runs each function under the oldest and the newest Lightning that pyproject.toml allows.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer import call


def global_seed() -> int:
    """Return the seed that ``seed_everything`` set; 0 where it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Environment variables in which ``seed_everything`` keeps the seed, for this process and those that it starts."""


def is_debug_run(trainer: pl.Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``: a few batches to try the code, with nothing to keep."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_interval(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps between two logged ones."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return max(1, every)


class BuildFirst(pl.Callback):
    """Builds the model before the ``setup`` of the other callbacks; Lightning itself does so after it.

    Callbacks that average weights copy the model in ``setup``: of a model without layers they would average nothing.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Call the model's ``setup`` and ``configure_model``; Lightning calls both again, which must do no harm."""
        pl_module.setup(stage)
        call._call_configure_model(trainer)


def build_first(trainer: pl.Trainer) -> None:
    """Have the model built before the callbacks of a trainer are set up; for ``configure_callbacks``."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, BuildFirst) for callback in callbacks):
        callbacks.insert(0, BuildFirst())


# Training batches. Each is ready, started, processed (by the optimizer too) and completed (on_train_batch_end was
# called), and Lightning counts all four: in the middle of the third batch of a run they are 3, 3, 2, 2.


def batches_begun(trainer: pl.Trainer) -> int:
    """Return how many training batches the run has begun, the present one and those before a resume included."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def batches_done(trainer: pl.Trainer) -> int:
    """Return how many training batches the run has trained on, those before a resume included."""
    count: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return count


def ends_step(trainer: pl.Trainer) -> bool:
    """Return whether the present batch is the last one of an optimizer step, accumulated or cut short by an epoch."""
    return not trainer.fit_loop._should_accumulate()


def logs_this_step(trainer: pl.Trainer) -> bool:
    """Return whether what is logged now is written.

    Lightning counts the steps it logs by itself: ``global_step`` is one more as soon as the optimizer has stepped.
    """
    return (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % log_interval(trainer) == 0


def align_logged_step(trainer: pl.Trainer) -> None:
    """Make the step that metrics are logged with that of the optimizer; for ``on_train_batch_start``.

    Lightning's own count stays one behind, for good, in a run that resumes a checkpoint of a validation which its own
    interval does not have.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def can_resume_here(trainer: pl.Trainer) -> bool:
    """Return whether a checkpoint written in ``on_train_batch_end`` of the present batch resumes exactly.

    It does not where a validation follows, which the resumed run would skip, nor after the last of several batches of
    an epoch: Lightning miscounts epochs when it resumes between the last batch of one and its end.
    """
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher) and not loop.val_loop.skip
    ends_epoch = loop.batch_progress.is_last_batch and trainer.num_training_batches > 1
    return not validates and not ends_epoch


# Validation


def set_validation_interval(trainer: pl.Trainer, batches: int) -> None:
    """Validate after every so many training batches; for ``on_train_start``, when Lightning has set its own number."""
    trainer.val_check_batch = batches


def validate_now(trainer: pl.Trainer) -> None:
    """Have a validation follow the present batch; for ``on_train_batch_end`` of the last one of a run.

    A validation after a time (``val_check_interval`` of hours) stays as it is.
    """
    if trainer.val_check_batch is None:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if trainer.check_val_every_n_epoch is None:
        trainer.val_check_batch = progress.total.ready
    else:
        trainer.val_check_batch, trainer.check_val_every_n_epoch = progress.current.ready, 1


def write_step_metrics(trainer: pl.Trainer) -> None:
    """Write what was logged in the present step, for ``on_train_batch_end``: Lightning does it later."""
    trainer._logger_connector.update_train_step_metrics()


def has_ended(checkpoint: dict[str, Any], max_steps: int, max_epochs: int | None) -> bool:
    """Return whether nothing is left to train for a run that resumes a checkpoint; -1: no limit."""
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]
    # A checkpoint of the last validation is within the last epoch, which has no batch left.
    done = epochs["ready" if loop["epoch_loop.batch_progress"]["is_last_batch"] else "processed"]
    steps = checkpoint["global_step"]
    return bool(steps and (0 <= max_steps <= steps or 0 <= (-1 if max_epochs is None else max_epochs) <= done))


def restart_validation(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint saved in the middle of a validation: the run that resumes it begins the validation again.

    Lightning would resume in the middle, but no checkpoint holds what the metrics have seen until then. With batches
    counted over all validations (total) and in this one (current), two batches into the second validation of three:

    - total: ready 5, completed 5 becomes ready 4, completed 3
    - current: ready 2, completed 2 becomes ready 1, completed 0: stopped before its first batch was done
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    earlier = progress["total"]["completed"] - progress["current"]["completed"]
    for counts, before in ((progress["total"], earlier), (progress["current"], 0)):
        counts |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    progress["is_last_batch"] = False


def finish_with(trainer: pl.Trainer, last: Callable[[], None]) -> None:
    """Have something done at the end of the fit loop while the run still stands; for ``on_fit_start``.

    Also where no step is left: Lightning then calls none of the hooks of training.
    """
    run = trainer.fit_loop.run

    def both() -> None:
        run()
        last()

    trainer.fit_loop.run = both  # type: ignore[method-assign]


def validate_at_the_end(trainer: pl.Trainer) -> None:
    """Run the validation of the fit loop, as after its last batch; for ``finish_with``."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


# Signals and errors


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """Return the signal with which SLURM asks to save and requeue the job; None where it will not."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the checkpoint that this SLURM job saved before it was requeued. A fit resumes it by itself."""
    path = trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None
    return None if path is None else Path(path)


def raised_while_resuming(error: BaseException) -> bool:
    """Return whether an error was raised while Lightning took over the training state of a checkpoint."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        code.co_filename.endswith("checkpoint_connector.py") and re.match("_?(restore|resume)", code.co_name)
        for code in codes
    )


def was_interrupted(exit: SystemExit) -> bool:
    """Return whether Lightning ends the process because a KeyboardInterrupt reached its trainer."""
    return isinstance(exit.__context__, KeyboardInterrupt)
