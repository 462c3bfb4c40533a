"""From the loss to the weights: gradients accumulated over batches, clipping, and steps that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer

from llmkit.contracts import Batch, Loss
from llmkit.errors import UserError, note, returned
from llmkit.lightning import batches_begun, log_interval
from llmkit.ops.metrics import EXACT

UNIT = 1024.0
"""Scale of summed losses until their count is known, for fp16's range; a power of two, so nothing is rounded."""


class GradientAccumulator:
    """Makes the gradient of several batches, accumulated or on several processes, that of one large batch.

    Each batch back-propagates its loss as a sum, and the gradient is divided by the count of all tokens (or examples)
    at the end. Example: losses 2, 2, 2 in one batch and 6 in another have the mean 12 / 4 = 3; the mean of the two
    batches' means would be (2 + 6) / 2 = 4, because it gives the single token as much weight as the other three.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """Summed loss and count so far, (2,); None when no batch was added since the last step."""

    def add(self, summed: Loss, batches: int, accumulated: int = 1) -> tuple[Tensor, Tensor]:
        """Return the loss to back-propagate, and the mean loss of the step so far.

        The value of the loss to back-propagate is the mean loss of the batch, which callbacks are given; its gradient
        is that of the sum.

        Args:
            summed: the loss of a batch.
            batches: batches per step, on all processes together.
            accumulated: batches per step on this process, by which Lightning divides the loss.
        """
        mean = summed.total / summed.count.clamp(min=1)
        if batches == 1:
            return mean, mean.detach()
        new = torch.stack([summed.total.detach().to(EXACT), summed.count.detach().to(EXACT)])
        self.sums = new if self.sums is None else self.sums + new
        scaled = summed.total / UNIT
        return scaled + (mean * accumulated - scaled).detach(), (self.sums[0] / self.sums[1].clamp(min=1)).float()

    def close(self, batches: int) -> Tensor | float:
        """End the step and return the factor that its gradient needs; the number 1.0 when it needs none."""
        if self.sums is None:
            return 1.0
        sums, self.sums = self.sums, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return (batches * UNIT / sums[1].clamp(min=1)).float()  # Lightning has divided by the number of batches


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together; where they are sharded, over the shards of all processes."""
    # Of half-precision gradients in single precision: a norm is a sum of squares. Others keep their dtype.
    parts = [part.float() if part.dtype.itemsize < 4 else part for part in map(local_shard, gradients)]
    norm = get_total_norm(parts)
    if any(hasattr(gradient, "to_local") for gradient in gradients):
        square = norm**2
        distributed.all_reduce(square)
        norm = square.sqrt()
    return norm


def multiply(gradients: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients in place. A number that is not a tensor can only be 1.0: it costs no pass over them."""
    if isinstance(factor, Tensor) and gradients:
        torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)


class BadSteps:
    """Skips steps whose gradient is NaN or infinite, and counts them.

    Reading the outcome of each step would make the host wait for an accelerator. There, a fused optimizer of torch or
    Muon skips the step on the device (``found_inf``), and the outcomes of several steps are read at once.

    Args:
        limit: this many in a row end the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._pending: list[tuple[int, Batch, Tensor]] = []

    def add(self, step: int, batch: Batch, norm: Tensor, optimizer: Optimizer, wait: int) -> None:
        """Skip a step if its gradient norm is not finite.

        Args:
            step: number of the step.
            batch: its last batch.
            norm: its gradient norm.
            optimizer: the optimizer that is about to step.
            wait: number of steps after which outcomes are read; 1: at once.
        """
        bad = ~torch.isfinite(norm)
        if wait > 1 and (optimizer.defaults.get("fused") or getattr(optimizer, "reads_found_inf", False)):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bool(bad):
            optimizer.zero_grad()
        self._pending.append((step, batch, bad))

    def settle(self, wait: int = 1) -> Iterator[tuple[int, Batch]]:
        """Yield the bad ones of the added steps, with their batches, once ``wait`` steps were added.

        While a step is yielded, ``in_a_row`` counts the bad steps up to it.
        """
        if self._pending and len(self._pending) >= wait:
            steps, self._pending = self._pending, []
            outcomes = torch.stack([bad for *_, bad in steps]).tolist()
            for (step, batch, _), bad in zip(steps, outcomes, strict=True):
                self.in_a_row = self.in_a_row + 1 if bad else 0
                if bad:
                    yield step, batch


class OptimizerStep:
    """The optimizer step that a run is in: from its first batch to its gradient, whole or interrupted in between.

    Args:
        max_bad_steps: this many steps in a row with a gradient that is not finite end the run.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.accumulator = GradientAccumulator()
        self.bad_steps = BadSteps(max_bad_steps)
        self.batch: Batch = {}
        """The last training batch."""

    @property
    def batch_shape(self) -> str:
        """The shapes of the last training batch, in words, once there was one."""
        tensors = {name: value for name, value in self.batch.items() if isinstance(value, Tensor) and value.dim()}
        shapes = ", ".join(f"{name} {' x '.join(map(str, value.shape))}" for name, value in tensors.items())
        return f" (the last batch: {shapes})" if shapes else ""

    def loss(self, model: pl.LightningModule, summed: Loss) -> tuple[Tensor, Tensor]:
        """Return the loss to back-propagate for a batch, and the mean loss of the step so far."""
        if not isinstance(summed, Loss):
            raise returned(model.head, "loss", summed, "a Loss(total, count)")
        return self.accumulator.add(summed, _batches(model.trainer), int(model.trainer.accumulate_grad_batches))

    def finish(self, model: pl.LightningModule, optimizer: Optimizer, limit: float | None) -> None:
        """Make the gradient that of the step's mean loss, clip its norm, and skip the step if it is not finite.

        Args:
            model: the model that trains.
            optimizer: its gradients are complete.
            limit: the largest norm; None or 0: no limit.
        """
        trainer = model.trainer
        groups: list[dict[str, Any]] = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        scale = self.accumulator.close(_batches(trainer))
        root = getattr(trainer.strategy, "model", None)
        if isinstance(root, FullyShardedDataParallel):
            multiply(gradients, scale)
            norm = root.clip_grad_norm_(limit or float("inf"))
        else:
            norm = gradient_norm(gradients) * scale
            if limit:
                scale = scale * (limit / (norm + 1e-6)).clamp(max=1.0)
            multiply(gradients, scale)
        # A gradient scaler meets infinite gradients while it looks for its scale, and skips those steps itself.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            wait = 1 if model.device.type == "cpu" else min(log_interval(trainer), 50)
            self.bad_steps.add(trainer.global_step + 1, self.batch, norm, optimizer, wait)
            self.report(trainer, wait)

    def report(self, trainer: pl.Trainer, wait: int = 1) -> None:
        """Report bad steps. Too many in a row: save the batch of the last one, and raise UserError."""
        for step, batch in self.bad_steps.settle(wait):
            row = self.bad_steps.in_a_row
            if row < self.bad_steps.limit:
                note(f"step {step}: the loss or its gradient is NaN or infinite; the step is skipped")
                continue
            path = Path(trainer.log_dir or trainer.default_root_dir) / f"bad_step_{step}.pt"
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(batch, path)
            raise UserError(
                f"step {step}: the loss or its gradient is NaN or infinite, {row} step(s) in a row "
                f"(model.max_bad_steps). Weights and checkpoints are unaffected. The step's last batch, "
                f"number {batches_begun(trainer)} of the run, is in {path}. Try a lower model.optimizer.lr or "
                f"trainer.precision 32-true"
            )

    def state(self, model: pl.LightningModule) -> dict[str, Any]:
        """Return the part of an unfinished step that a checkpoint needs."""
        trainer = model.trainer
        self.report(trainer)
        state: dict[str, Any] = {"bad_steps": self.bad_steps.in_a_row}
        sums = self.accumulator.sums
        if sums is None:
            return state
        gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        sharded = any(hasattr(gradient, "to_local") for gradient in gradients.values())
        if sharded or isinstance(trainer.strategy, FSDPStrategy):
            note("sharded checkpoint in the middle of a step: a resumed run loses the gradients accumulated so far")
            return state
        if trainer.world_size > 1:
            # Each process will resume with the mean gradient, and the first process with all of the sums.
            reduce = trainer.strategy.reduce
            gradients = {name: reduce(gradient.clone(), reduce_op="mean") for name, gradient in gradients.items()}
            sums = reduce(sums.clone(), reduce_op="sum")
        return {**state, "sums": sums, "gradients": gradients}

    def restore(self, model: pl.LightningModule, state: dict[str, Any]) -> None:
        """Resume the step that ``state`` was taken in."""
        self.bad_steps.in_a_row = state.get("bad_steps", 0)
        if state.get("sums") is None:
            return
        sums: Tensor = state["sums"].to(model.device)
        self.accumulator.sums = sums if model.global_rank == 0 else torch.zeros_like(sums)
        for name, parameter in model.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)


def _batches(trainer: pl.Trainer) -> int:
    """Return the number of batches per step, on all processes together."""
    return int(trainer.accumulate_grad_batches) * trainer.world_size
