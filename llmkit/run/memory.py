"""Keeps the memory of a training on a CPU steady where the shapes of batches differ."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import lightning.pytorch as pl

KERNELS = "256"
"""How many products oneDNN keeps ready (its own limit is 1,024), one for each shape. A limit of 128 took no more time
than 1,024 in 40 steps of 31 shapes; none at all took four times as long. The code of a product stays in memory whatever
the limit: 0.26 MiB for each shape ever seen in bf16. So batches have few shapes (``round_number`` in
``llmkit/data/examples.py``, ``ROWS`` in ``llmkit/ops/losses.py``)."""

ROOM, LEAST = 3.0, 1.5
"""Memory is returned when more is held than ``ROOM`` times what was left after the first step, and never before it is
``LEAST`` times what the last return left. Returning it is not free: the system clears every page that is used again,
which after each step of a small translator took 22 % of its time."""

_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def bound_kernels() -> None:
    """Bound oneDNN's cache, unless the environment does. Call it before the first product of matrices."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)


class ReturnMemory(pl.Callback):
    """Returns freed memory to the system when much is held, where training is on a CPU and glibc keeps it.

    Tensors of ever other sizes leave gaps between each other that glibc keeps: a translator that needs 0.6 GiB for a
    step held 2.4 GiB after 45.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at whether there is something to do."""
        self._trims = _trim is not None and pl_module.device.type == "cpu"
        self._limit = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Return what is free."""
        if self._trims and resident() > self._limit:
            _trim(0)
            self._limit = max(self._limit, LEAST * resident()) if self._limit else ROOM * resident()


def resident() -> int:
    """Return the bytes of memory that this process holds (Linux)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
