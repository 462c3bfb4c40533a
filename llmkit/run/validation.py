"""When a run is validated: the last step always is."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from llmkit.errors import Problem, UserError, note, unknown
from llmkit.lightning import is_debug_run, set_validation_interval, validate_now

DEFAULT_INTERVAL = 500
"""Batches between two validations, at most, when the config does not set them."""


class Validations(Callback):
    """Fits the default interval to the run, has the last step validated, and notes settings longer than the run.

    1,200 batches are validated every 400 (not at 500 and 1,000, with the last 200 unseen).
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at how long the run is, and at what callbacks wait for. Raises UserError for a metric there never is."""
        check_monitors(trainer, pl_module)
        self._steps = trainer.estimated_stepping_batches
        batches = self._steps * trainer.accumulate_grad_batches
        interval = trainer.val_check_interval
        if is_debug_run(trainer) or batches in (0, float("inf")):
            return
        if interval == DEFAULT_INTERVAL:
            set_validation_interval(trainer, math.ceil(batches / math.ceil(batches / DEFAULT_INTERVAL)))
        elif isinstance(interval, int) and interval > batches and trainer.enable_validation and trainer.is_global_zero:
            note(
                f"trainer.val_check_interval {interval} is more than the {int(batches)} batches of the run, which is "
                "validated once, at its end"
            )
        warmup = getattr(trainer.lr_scheduler_configs[0].scheduler, "warmup_steps", 0)
        if warmup > self._steps and trainer.is_global_zero:
            note(
                f"model.scheduler.warmup_steps {warmup} is more than the {int(self._steps)} steps of the run: the "
                f"learning rate ends at {self._steps / warmup:.0%} of its peak"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        """Have a validation follow the last step."""
        if trainer.global_step >= self._steps:
            validate_now(trainer)


def check_monitors(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Raise UserError for a callback that monitors a ``val_`` metric which the head does not have.

    Lightning would notice at the first validation. A callback of the user's own may log further ones.
    """
    known = [f"val_{name}" for name in getattr(model, "val_metrics", ())]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if {type(callback).__module__.partition(".")[0] for callback in callbacks} - {"lightning", "llmkit"}:
        return
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and name.startswith("val_") and name not in known:
            text = f"{type(callback).__name__}: {unknown('metric', name, known)}"
            raise UserError(Problem("trainer.callbacks", text))
