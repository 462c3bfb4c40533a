"""Between the loss and the weights: the gradient of a step of several batches, its norm, and steps that go wrong."""

from __future__ import annotations

from collections.abc import Sequence
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
from llmkit.errors import UserError, note
from llmkit.ops.metrics import EXACT

UNIT = 1024.0
"""What sums of losses are divided by before their sizes are known; a power of two, so that nothing is rounded."""


class Window:
    """The batches of one optimizer step: those accumulated, on all processes.

    Each one's loss is back-propagated as a sum, and the gradient is divided by the number of all tokens (or examples)
    at the end. It is then that of one large batch; a mean of the batches' means would weigh tokens unequally.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """Loss and count so far, (2,); None when no batch has been added since the last step."""

    def add(self, summed: Loss, batches: int) -> tuple[Tensor, Tensor]:
        """Return the loss to back-propagate, and the mean loss of the step so far.

        Args:
            summed: the loss of a batch.
            batches: how many of them a step has, on all processes together.
        """
        if batches == 1:
            loss = summed.total / summed.count.clamp(min=1)
            return loss, loss.detach()
        new = torch.stack([summed.total.detach().to(EXACT), summed.count.detach().to(EXACT)])
        self.sums = new if self.sums is None else self.sums + new
        return summed.total / UNIT, (self.sums[0] / self.sums[1].clamp(min=1)).float()

    def close(self, batches: int) -> Tensor | None:
        """Return what the gradient has to be multiplied by; None when it is right already.

        Lightning has divided it by the number of batches.
        """
        if self.sums is None:
            return None
        sums, self.sums = self.sums, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return (batches * UNIT / sums[1].clamp(min=1)).float()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, any other one as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, of all processes' shards where they are sharded."""
    norm = get_total_norm([local(gradient) for gradient in gradients])
    if any(hasattr(gradient, "to_local") for gradient in gradients):
        square = norm**2
        distributed.all_reduce(square)
        norm = square.sqrt()
    return norm


def multiply(gradients: Sequence[Tensor], factor: Tensor | None) -> None:
    """Multiply gradients in place; None: leave them."""
    if factor is not None and gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


class BadSteps:
    """Keeps steps whose gradient is NaN or infinite from the weights, and counts them.

    On an accelerator an optimizer that can leave out a step by itself (``fused``) is told to, and the outcome is read
    some steps later: waiting for each step would cost time.

    Args:
        most: so many in a row are too many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_a_row = 0
        self._open: list[tuple[int, Batch, Tensor]] = []

    def add(self, step: int, batch: Batch, norm: Tensor, optimizer: Optimizer, wait: int) -> None:
        """Note a step's gradient norm, and leave out the step if it is not finite.

        Args:
            step: number of the step.
            batch: its last batch.
            norm: its gradient norm.
            optimizer: what would change the weights.
            wait: how many steps may pass before the outcome is read; 1: none.
        """
        bad = ~torch.isfinite(norm)
        if wait > 1 and optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bool(bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self._open.append((step, batch, bad))

    def settle(self, wait: int = 1) -> list[tuple[int, Batch]]:
        """Return the bad steps that ``add`` was told of and their batches, once there are ``wait`` to look at."""
        if len(self._open) < wait or not self._open:
            return []
        steps, self._open = self._open, []
        found = []
        for (step, batch, _), bad in zip(steps, torch.stack([bad for *_, bad in steps]).tolist(), strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                found.append((step, batch))
            if self.in_a_row >= self.most:
                break
        return found


class Step:
    """The optimizer step that a model is in.

    Args:
        max_bad_steps: the run stops after so many steps in a row with a gradient that is not finite.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.window = Window()
        self.bad = BadSteps(max_bad_steps)
        self.batch: Batch = {}
        """The last one that was trained on."""

    def loss(self, model: pl.LightningModule, summed: Loss) -> tuple[Tensor, Tensor]:
        """Return what to back-propagate for a batch, and the mean loss of the step so far."""
        return self.window.add(summed, _batches(model.trainer))

    def finish(self, model: pl.LightningModule, optimizer: Optimizer, limit: float | None) -> None:
        """Make the gradient that of the step's mean loss, clip its norm, and keep a bad one from the weights.

        Args:
            model: the model that trains.
            optimizer: whose gradients are complete.
            limit: the largest norm; None or 0: any.
        """
        trainer = model.trainer
        groups: list[dict[str, Any]] = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        scale = self.window.close(_batches(trainer))
        root = getattr(trainer.strategy, "model", None)
        if isinstance(root, FullyShardedDataParallel):
            multiply(gradients, scale)
            norm = root.clip_grad_norm_(limit or float("inf"))
        else:
            norm = gradient_norm(gradients)
            if scale is not None:
                norm = norm * scale
            if limit:
                clip = (limit / (norm + 1e-6)).clamp(max=1.0)
                scale = clip if scale is None else clip * scale
            multiply(gradients, scale)
        # A gradient scaler meets infinite gradients while it looks for its scale, and leaves those steps out itself.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            wait = 1 if model.device.type == "cpu" else max(1, min(every, 50))
            self.bad.add(trainer.global_step + 1, self.batch, norm, optimizer, wait)
            self.tell(trainer, wait)

    def tell(self, trainer: pl.Trainer, wait: int = 1) -> None:
        """Tell of bad steps. Raises UserError when there were too many in a row; the last batch is saved then."""
        for step, batch in self.bad.settle(wait):
            row = self.bad.in_a_row
            if row < self.bad.most:
                note(f"step {step}: the loss or its gradient is NaN or infinite; the step is left out")
                continue
            path = Path(trainer.log_dir or trainer.default_root_dir) / f"bad_step_{step}.pt"
            number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(batch, path)
            raise UserError(
                f"step {step}: the loss or its gradient is NaN or infinite, {row} step(s) in a row "
                f"(model.max_bad_steps). They have changed no weights and no checkpoint. The step's last batch, number "
                f"{number} of the run, is in {path}. A lower model.optimizer.lr or trainer.precision 32-true may help"
            )

    def state(self, model: pl.LightningModule) -> dict[str, Any]:
        """Return what a checkpoint needs of a step that is not done yet."""
        trainer = model.trainer
        self.tell(trainer)
        state: dict[str, Any] = {"bad_steps": self.bad.in_a_row}
        sums = self.window.sums
        if sums is None:
            return state
        gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        sharded = any(hasattr(gradient, "to_local") for gradient in gradients.values())
        if sharded or isinstance(trainer.strategy, FSDPStrategy):
            note("a sharded checkpoint between the batches of a step: a run that resumes it misses their gradients")
            return state
        if trainer.world_size > 1:
            # Each process goes on with the mean gradient, and the sums go to the first.
            reduce = trainer.strategy.reduce
            gradients = {name: reduce(gradient.clone(), reduce_op="mean") for name, gradient in gradients.items()}
            sums = reduce(sums.clone(), reduce_op="sum")
        return {**state, "sums": sums, "gradients": gradients}

    def restore(self, model: pl.LightningModule, state: dict[str, Any]) -> None:
        """Go on within the step that ``state`` was taken in."""
        self.bad.in_a_row = state.get("bad_steps", 0)
        if state.get("sums") is None:
            return
        sums: Tensor = state["sums"].to(model.device)
        self.window.sums = sums if model.global_rank == 0 else torch.zeros_like(sums)
        for name, parameter in model.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)


def _batches(trainer: pl.Trainer) -> int:
    """Return how many batches a step has, on all processes together."""
    return int(trainer.accumulate_grad_batches) * trainer.world_size
