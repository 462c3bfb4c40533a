"""Ctrl-C, SIGTERM and a cluster's signals: finish the step, save, and print how to resume."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmkit.errors import Stopped
from llmkit.lightning import ends_epoch, log_interval, requeue_signal, restart_validation, validation_follows
from llmkit.run.saving import Checkpoints, run_folder

Handler = Callable[[int, FrameType | None], Any]


class GracefulShutdown(Callback):
    """Defers every signal to the end of the step, because weights that are half updated cannot be resumed.

    A second Ctrl-C stops at once, without saving. SLURM's signal to requeue gets Lightning's own handler, only later.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._requeue: Handler | None = None
        self._previous: dict[int, Any] = {}
        self._validating = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers."""
        self._received = None
        requeue = requeue_signal(trainer)
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, requeue)):
            with contextlib.suppress(ValueError):  # not in the main thread: whoever runs the trainer handles signals
                self._previous[number] = signal.signal(number, self._receive)
        self._requeue = self._previous.get(requeue or 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received == signal.SIGINT:
                raise KeyboardInterrupt
            print("\nllmkit: stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self._received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the step; where a validation is due, at its beginning; at the end of an epoch, one batch later."""
        # Several processes have to agree on a signal that one of them received: that costs time, so now and then only.
        every = log_interval(trainer) if trainer.world_size > 1 else 1
        if (batch_idx + 1) % every == 0 and not ends_epoch(trainer) and not validation_follows(trainer):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that a validation is not done yet."""
        self._validating = trainer.state.fn == "fit"

    def on_validation_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Stop between two batches."""
        if self._validating and trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the validation is done."""
        self._validating = False

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        received = self._received
        if trainer.world_size > 1:
            number = torch.tensor(received or 0, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(number, reduce_op="max")) or None
        if received is None:
            return
        self._received = None
        if received not in (signal.SIGINT, signal.SIGTERM):
            if callable(self._requeue):
                self._requeue(received, None)
            return
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
