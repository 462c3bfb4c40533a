"""What a run did, batch by batch, exactly: one JSON line each, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from llmkit.lightning import batches_begun
from llmkit.model.language_model import LanguageModel


class Trace(Callback):
    """Writes each loss and each validation metric, to the last bit, into a file of this process.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file; its name begins with the step that training goes on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{os.getpid()}.jsonl"
        self._file = path.open("w", encoding="utf-8", buffering=1)  # a line is written when it ends
        self._write(event="start", at=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the loss of a batch (of the step so far, where batches are accumulated)."""
        assert isinstance(pl_module, LanguageModel)
        loss = float(pl_module.last_loss).hex()
        self._write(event="batch", at=batches_begun(trainer), step=trainer.global_step, loss=loss)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write that a validation begins."""
        if trainer.state.fn == "fit":
            self._write(event="validation begins", at=batches_begun(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics of a validation."""
        if trainer.state.fn == "fit":
            metrics = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            self._write(event="validation", at=batches_begun(trainer), step=trainer.global_step, **metrics)

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps({**line, "time": time.time()}) + "\n")
