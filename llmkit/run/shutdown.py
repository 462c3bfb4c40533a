"""Ctrl-C, SIGTERM and a cluster's signals: finish the step, save, and print how to resume."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmkit.errors import Stopped
from llmkit.lightning import (
    can_resume_here,
    finish_with,
    log_interval,
    requeue_signal,
    restart_validation,
    validate_at_the_end,
    write_step_metrics,
)
from llmkit.run.folder import run_folder
from llmkit.run.saving import Checkpoints

COPY = 1.0
"""Seconds after a signal in which a SIGTERM is a copy of it: a cluster signals the job's processes and their parents,
which pass it on."""


class GracefulShutdown(Callback):
    """Defers every signal to the end of the step, because weights that are half updated cannot be resumed.

    A second signal stops at once, without saving, and so does the first one while the first step is compiled: that may
    take minutes, more than a cluster grants, and there is nothing new to save. SLURM's signal to requeue gets
    Lightning's own handler, only later.
    """

    def __init__(self) -> None:
        self._received, self._asked_at = 0, 0.0
        self._compiling = False
        self._previous: dict[int, Any] = {}
        self._validating = False
        self._unfinished = False  # the checkpoint that is resumed was saved within a validation

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is not done yet."""
        return {"validating": True} if self._validating else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note whether a validation was not done yet."""
        self._unfinished = bool(state_dict.get("validating"))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat a validation that was not done after the last step: Lightning resumes within steps alone."""

        def last() -> None:
            if self._unfinished:
                validate_at_the_end(trainer)

        finish_with(trainer, last)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers."""
        self._received = 0
        self._compiling = bool(getattr(pl_module, "spec", {}).get("compile"))
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, requeue_signal(trainer))):
            with contextlib.suppress(ValueError):  # not in the main thread: whoever runs the trainer handles signals
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self._received = number
            return
        name, now = signal.Signals(number).name, time.monotonic()
        asked = self._received in (signal.SIGINT, signal.SIGTERM)
        if asked and number == signal.SIGTERM and now < self._asked_at + COPY:
            return
        if self._compiling or asked:
            why = "during the compilation, before the first step" if self._compiling else "by the second signal"
            print(f"\nllmkit: stopped by {name} {why}; nothing more is saved", file=sys.stderr, flush=True)
            if number == signal.SIGINT and not self._compiling:
                raise KeyboardInterrupt
            # As if there were no handler: an exception could get lost in the compiler, or wait for its processes.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
        print(f"\nllmkit: {name}: stopping after this step; {again} to stop now", file=sys.stderr, flush=True)
        self._received, self._asked_at = number, now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the step; at the start of the validation if one is due, one batch later at the end of an epoch."""
        self._compiling = False
        # Processes have to agree on a signal that one of them received. That takes time, so they do it rarely.
        every = log_interval(trainer) if trainer.world_size > 1 else 1
        if (batch_idx + 1) % every == 0 and can_resume_here(trainer):
            self._stop_if_asked(trainer, between_steps=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that a validation is not done yet."""
        self._validating, self._unfinished = trainer.state.fn == "fit", False

    def on_validation_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Stop between two batches."""
        if self._validating and trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the validation is done."""
        self._validating = False

    def _stop_if_asked(self, trainer: pl.Trainer, between_steps: bool = False) -> None:
        received = self._received
        if trainer.world_size > 1:
            number = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(number, reduce_op="max"))
        if not received:
            return
        self._received = 0
        if received not in (signal.SIGINT, signal.SIGTERM):
            requeue = self._previous.get(received)
            if callable(requeue):
                if isinstance(trainer.checkpoint_callback, Checkpoints):
                    trainer.checkpoint_callback.save(trainer)  # for a command with --ckpt_path last
                requeue(received, None)
            return
        if between_steps:
            write_step_metrics(trainer)
        path, saver = run_folder(trainer) / "checkpoints" / "last.ckpt", trainer.checkpoint_callback
        if isinstance(saver, Checkpoints):
            saver.save(trainer)
        else:
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            name = signal.Signals(received).name
            print(f"\nllmkit: stopped by {name} at step {trainer.global_step}; saved {path}", file=sys.stderr)
            print("To resume, run the same command with --ckpt_path last", file=sys.stderr, flush=True)
        raise Stopped(received)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have an unfinished validation repeated from its first batch by the run that resumes this one."""
        if self._validating:
            restart_validation(checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
