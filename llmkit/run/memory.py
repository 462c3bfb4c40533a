"""Keeps the memory of a training on a CPU steady where the shapes of batches differ."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import lightning.pytorch as pl

KERNELS = "256"
"""How many products oneDNN keeps ready (its own limit is 1,024), one for each shape. A limit of 128 took no more time
than 1,024 in 40 steps of 31 shapes; none at all took four times as long. The code of a product stays in memory whatever
the limit: 0.26 MiB for each shape ever seen in bf16. So batches have few shapes (``round_number`` in
``llmkit/data/examples.py``, ``ROWS`` in ``llmkit/ops/losses.py``)."""

INTERVAL = 10.0
"""Seconds between two returns of memory. The system clears every page that is used again: after each step of a small
translator, that took 22 % of its time."""

_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def bound_kernels() -> None:
    """Bound oneDNN's cache, unless the environment does. Call it before the first product of matrices."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)


class ReturnMemory(pl.Callback):
    """Returns freed memory to the system every ten seconds, where training is on a CPU and the C library can (glibc).

    Tensors of ever other sizes leave gaps between each other that glibc keeps: a translator that needs 0.6 GiB for a
    step held 2.4 GiB after 45.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count the time."""
        self._trims = _trim is not None and pl_module.device.type == "cpu"
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Return what is free."""
        if self._trims and time.monotonic() - self._last >= INTERVAL:
            _trim(0)
            self._last = time.monotonic()
