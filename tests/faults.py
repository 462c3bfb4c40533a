"""Callbacks that make runs fail: NaN gradients, weights and signals, and a power cut, each at a chosen moment."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Poison(Callback):
    """Makes one number of the gradient NaN in some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step + 1 in self.steps:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).view(-1)[0] = float("nan")


class Spoil(Callback):
    """Makes weights infinite after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        if trainer.global_step == self.step:
            next(pl_module.parameters()).data.fill_(float("inf"))


class Sender(Callback):
    """Sends the process a signal in the middle of a step, or at a batch of the validation after it."""

    def __init__(self, number: int, step: int, validation_batch: int = -1) -> None:
        self.number, self.step, self.validation_batch = number, step, validation_batch

    def _send(self, trainer: pl.Trainer, here: bool) -> None:
        if here and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_before_zero_grad(self, trainer: pl.Trainer, *rest: Any) -> None:
        self._send(trainer, self.validation_batch < 0)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        self._send(trainer, batch_idx == self.validation_batch)


class PowerCut(BaseException):
    """Nothing is tidied up after it."""


class Dying(Callback):
    """Dies at the first moment of a kind after some batches."""

    def __init__(self, batch: int, moment: str) -> None:
        self.batch, self.moment = batch, moment

    def _die(self, trainer: pl.Trainer, moment: str) -> None:
        if moment == self.moment and trainer.fit_loop.epoch_loop.batch_progress.total.ready >= self.batch:
            raise PowerCut

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._die(trainer, "backward")

    def on_validation_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        self._die(trainer, "validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, *rest: Any) -> None:
        self._die(trainer, "writing")


class Greedy(Callback):
    """Asks for more memory than any machine has."""

    def on_train_batch_end(self, *rest: Any) -> None:
        torch.empty(10**15)
