"""Ctrl-C, SIGTERM and a cluster's signals: the running step ends, the run is saved and says how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from llmkit.errors import Stopped
from llmkit.run.saving import Checkpoints, ends_epoch, run_folder, validation_is_due

Handler = Callable[[int, FrameType | None], Any]


class Stopping(Callback):
    """Waits with every signal until the step is done, because weights that are half updated cannot be resumed.

    A second Ctrl-C stops at once, without saving. The signal with which SLURM asks to requeue is handled as Lightning
    does, only later.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._requeue: Handler | None = None
        self._old: dict[int, Any] = {}
        self._validating = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals."""
        self._asked = None
        self._take(signal.SIGINT)
        self._take(signal.SIGTERM)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            number = environment.requeue_signal or signal.SIGUSR1
            self._take(number)
            self._requeue = self._old.get(number)

    def _take(self, number: int) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread: who runs the trainer there handles signals
            self._old[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._asked == signal.SIGINT:
                raise KeyboardInterrupt
            print("\nllmkit: stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self._asked = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the step; where a validation is due, at its beginning; at the end of an epoch, one batch later."""
        every = max(1, trainer.log_every_n_steps) if trainer.world_size > 1 else 1  # type: ignore[attr-defined]
        if (batch_idx + 1) % every == 0 and not ends_epoch(trainer) and not validation_is_due(trainer):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that a validation is not done yet."""
        self._validating = trainer.state.fn == "fit"

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop between two batches."""
        if self._validating and trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the validation is done."""
        self._validating = False

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            number = torch.tensor(asked or 0, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(number, reduce_op="max")) or None
        if asked is None:
            return
        self._asked = None
        if asked not in (signal.SIGINT, signal.SIGTERM):
            if callable(self._requeue):
                self._requeue(asked, None)
            return
        saver = trainer.checkpoint_callback
        if isinstance(saver, Checkpoints):
            path = saver.save(trainer)
        else:
            path = run_folder(trainer) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            name = signal.Signals(asked).name
            print(f"\nllmkit: stopped by {name} at step {trainer.global_step}; saved {path}", file=sys.stderr)
            print("Go on with the same command and --ckpt_path last", file=sys.stderr, flush=True)
        raise Stopped(asked)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a validation that is not done yet be run from its first batch on by the run that resumes this one.

        Lightning goes on in the middle, but what the metrics have seen until then is in no checkpoint.
        """
        if self._validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"] - progress["current"]["completed"]
            for counts, before in ((progress["total"], done), (progress["current"], 0)):
                counts |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
            progress["is_last_batch"] = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
