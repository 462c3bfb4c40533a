"""How fast a run is: tokens a second, model FLOPs utilisation, memory."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llmkit.contracts import Batch
from llmkit.model.language_model import LanguageModel

LOGGED = ("tokens_per_second", "mfu", "memory_gib")
"""What is logged: of all in a run's metrics, these alone differ from one machine to another."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a large matrix product: what the device does at best, in this precision.

    It is measured (about 0.1 s), so that it holds for any device, its threads and its present clock.
    """
    size = 1024 if device.type == "cpu" else 8192
    # Not random: a run's random numbers stay its own. Not constant: some devices multiply equal numbers faster.
    left = (torch.arange(size * size, device=device) % 251 - 125).to(dtype).view(size, size) / 125
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((left @ left.T)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def memory(device: torch.device) -> float:
    """Return the most memory taken so far, in GiB: of an accelerator, or of this process; 0 where it is not told."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Totals(NamedTuple):
    """What has been trained on since the start of a run, and in how long."""

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    """Without validations."""


class Meter:
    """Counts what is trained on.

    Args:
        model: what is trained; its network is built.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._network = model.meta_network(restored=True)  # whole, however the weights are sharded
        self._costs: dict[int, float] = {}
        self._start = time.monotonic()
        self._tokens = self._flops = 0.0

    def add(self, batch: Batch) -> None:
        """Count the positions of a batch, padding too, and the FLOPs of a step: three times the forward pass."""
        sides = [batch[name] for name in ("ids", "source") if name in batch]
        self._tokens += sum(side.numel() for side in sides)
        if "source" in batch and isinstance(batch.get("targets"), Tensor):
            sides.append(batch["targets"])
        for side in sides:
            # A position of an encoder-decoder is counted with one of the other side: here each has a half.
            self._flops += 3 * side.numel() * self._cost(side.shape[-1]) / len(sides)

    def _cost(self, length: int) -> float:
        if length not in self._costs:
            self._costs[length] = self._network.flops_per_position(length)
        return self._costs[length]

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not spent on training."""
        self._start += seconds

    def totals(self) -> Totals:
        """Return what has been counted so far."""
        return Totals(self._tokens, self._flops, time.monotonic() - self._start)


class Throughput(Callback):
    """Logs ``tokens_per_second``, ``mfu`` and ``memory_gib`` each time the loss is logged.

    MFU is the share of the device's matrix product rate that the model's own FLOPs take (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B), by the rate measured at the start of the run. The rates leave out validations.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the device and start the clock."""
        assert isinstance(pl_module, LanguageModel)
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).partition("-")[0])
        self._peak = peak_flops(pl_module.device, half or torch.float32)
        self._processes = trainer.world_size
        self._logged = Totals()
        self.meter = Meter(pl_module)

    def rates(self, before: Totals, now: Totals) -> tuple[float, float]:
        """Return tokens a second of all processes, and this one's MFU, between two times."""
        seconds = max(now.seconds - before.seconds, 1e-9)
        tokens = (now.tokens - before.tokens) * self._processes / seconds
        return tokens, (now.flops - before.flops) / seconds / self._peak

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log when the loss is logged."""
        self.meter.add(batch)
        loop = trainer.fit_loop
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (loop.epoch_loop._batches_that_stepped + 1) % every or loop._should_accumulate():
            return
        now = self.meter.totals()
        found = (*self.rates(self._logged, now), memory(pl_module.device))
        self._logged = now
        pl_module.log_dict(dict(zip(LOGGED, found, strict=True)), rank_zero_only=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.meter.pause(time.monotonic() - self._paused)
