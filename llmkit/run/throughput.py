"""How fast a run is: tokens per second, model FLOPs utilisation (MFU), memory."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llmkit.contracts import Batch
from llmkit.lightning import ends_step, logs_this_step
from llmkit.model.backbone import Backbone
from llmkit.model.language_model import LanguageModel

LOGGED = ("tokens_per_second", "mfu", "memory_gib")
"""The logged names. They are the only metrics of a run that differ between machines."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a large matmul: the most the device reaches in this precision.

    Measured in about 0.1 s, so it holds for any device, number of threads and clock. (Lightning's table of data sheets
    has no CPU, and no entry for a GPU that calls itself "NVIDIA H200".)
    """
    size = 1024 if device.type == "cpu" else 8192
    # Not random: that would shift the run's random numbers. Not constant: some devices multiply equal numbers faster.
    left = (torch.arange(size * size, device=device) % 251 - 125).to(dtype).view(size, size) / 125
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((left @ left.T)[0, 0])  # reading a number waits for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def memory(device: torch.device) -> float:
    """Return the peak memory in GiB, of the accelerator or of this process; 0 where the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Totals(NamedTuple):
    """The work of a run since its start."""

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    """Time spent on training, validations excluded."""


class _Pass:
    """What a network's passes over a batch cost, as a number of forward passes."""

    def __init__(self, times: int, network: Backbone, share: float | None) -> None:
        self.times = times
        self._cost = functools.cache(lambda length: network.flops_per_position(length, share))
        self._source_cost = functools.cache(network.encoder_flops)
        self._target_cost = functools.cache(network.decoder_flops)

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a batch, padding included."""
        source, target = batch.get("source"), batch.get("targets")
        if isinstance(source, Tensor) and isinstance(target, Tensor):
            S, T = source.shape[-1], target.shape[-1]
            once = source.numel() * self._source_cost(S) + target.numel() * self._target_cost(T, S)
        else:
            sides = [batch[name] for name in ("ids", "source") if name in batch]
            once = sum(side.numel() * self._cost(side.shape[-1]) for side in sides)
        return self.times * once


class Meter:
    """Counts the tokens and FLOPs of a run.

    A step costs three times the forward passes of the model, and one forward pass of a teacher.

    Args:
        model: the model that trains; its network is built.
    """

    def __init__(self, model: LanguageModel) -> None:
        network = model.meta_network()  # the whole network, even where its weights are sharded
        passes = [_Pass(3 * model.head.passes, network, model.head.scored_share)]
        if model.teacher is not None and model.teacher.settings.weight:
            teacher = model.teacher.model
            passes.append(_Pass(1, teacher.network, teacher.head.scored_share))
        self._passes = passes
        self._start = time.monotonic()
        self._tokens = self._flops = 0.0

    def add(self, batch: Batch) -> None:
        """Count the positions of a batch, padding included, and its FLOPs."""
        self._tokens += sum(batch[name].numel() for name in ("ids", "source") if name in batch)
        self._flops += sum(each.flops(batch) for each in self._passes)

    def pause(self, seconds: float) -> None:
        """Exclude time that was not spent on training."""
        self._start += seconds

    def totals(self) -> Totals:
        """Return the counts so far."""
        return Totals(self._tokens, self._flops, time.monotonic() - self._start)


class Throughput(Callback):
    """Logs ``tokens_per_second``, ``mfu`` and ``memory_gib`` each time the loss is logged.

    MFU is the FLOPs that the model needs over those that the device could do in that time (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B), by the peak measured at the start of the run. Unlike there, causal attention counts
    for half of the pairs of positions, which is what it needs, and the peak is not a data sheet's. Validations are
    excluded.
    """

    def __init__(self) -> None:
        self._before: int | None = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of tokens that the weights were trained on."""
        return {"tokens": self.tokens()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue the count of the run that is resumed, if it has one; an older llmkit did not count."""
        if trainer.state.fn == "fit":
            self._before = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("tokens")

    def tokens(self) -> int | None:
        """Return the tokens over resumes, padding included, of this process times their number; None: not counted."""
        own = self.meter.totals().tokens * self._processes if hasattr(self, "meter") else 0
        return None if self._before is None else int(self._before + own)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the device and start the clock."""
        assert isinstance(pl_module, LanguageModel)
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).partition("-")[0])
        self._peak = peak_flops(pl_module.device, half or torch.float32)
        self._processes = trainer.world_size
        self._logged = Totals()
        self.meter = Meter(pl_module)

    def rates(self, before: Totals, now: Totals) -> tuple[float, float]:
        """Return tokens per second of all processes, and the MFU of this one, between two readings."""
        seconds = max(now.seconds - before.seconds, 1e-9)
        tokens = (now.tokens - before.tokens) * self._processes / seconds
        return tokens, (now.flops - before.flops) / seconds / self._peak

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log when the loss is logged."""
        self.meter.add(batch)
        if logs_this_step(trainer) and ends_step(trainer):
            now = self.meter.totals()
            values = (*self.rates(self._logged, now), memory(pl_module.device))
            self._logged = now
            pl_module.log_dict(dict(zip(LOGGED, values, strict=True)), rank_zero_only=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock, if it was started: a resumed run may have nothing left but its last validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and hasattr(self, "meter"):
            self.meter.pause(time.monotonic() - self._paused)
