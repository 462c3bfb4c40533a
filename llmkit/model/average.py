"""The moving average of a model's weights, which validation, checkpoints and the final model have (``model.ema``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from llmkit.errors import Problem, UserError

AVERAGING = (callbacks.StochasticWeightAveraging, getattr(callbacks, "WeightAveraging", ()))
"""Lightning's callbacks that average weights; the second one has been there since 2.6."""


class MovingAverage:
    """Follows the weights that are trained: average = d * average + (1 - d) * weights after each optimizer step.

    d is ``decay``, in early steps (1 + t) / (10 + t), so that the random weights of the start are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage). Example with decay 0.999: 2/11 at the first step, 0.92 at step 100, 0.99 at
    step 890.

    The average is kept in single precision at least. It takes the memory of the weights once more, and a step reads and
    writes it once: one fused operation over all weights.

    Args:
        decay: d in the long run, above 0 and below 1.
        model: its weights are built, and in a resumed run they are those of the checkpoint, the average.
        stored: what ``state`` returned; {}: the average begins with the weights.
    """

    def __init__(self, decay: float, model: nn.Module, stored: Mapping[str, Any]) -> None:
        self.decay = decay
        self.steps = int(stored.get("steps", 0))
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        exact = stored.get("average", {})
        self.average = [
            exact.get(name, weight.detach()).to(
                weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True
            )
            for name, weight in self.weights.items()
        ]
        self._trained: list[Tensor] = []
        """The trained weights, while the model has the average in their place."""
        restore_trained(model, stored)

    def update(self) -> None:
        """Follow the weights of one more step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [weight.detach().to(average.dtype) for weight, average in zip(*self._pairs(), strict=True)]
        torch._foreach_lerp_(self.average, current, 1 - decay)

    def put_in(self) -> None:
        """Put the average in the place of the trained weights."""
        self._trained = [weight.detach().clone() for weight in self.weights.values()]
        torch._foreach_copy_([weight.data for weight in self.weights.values()], self.average)

    def take_out(self) -> None:
        """Put the trained weights back."""
        torch._foreach_copy_([weight.data for weight in self.weights.values()], self._trained)
        self._trained = []

    def state(self, model: nn.Module, saved: dict[str, Tensor]) -> dict[str, Any]:
        """Put the average into the weights of a checkpoint, and return what else a resumed run needs.

        Args:
            model: whose weights they are.
            saved: its state dict; changed in place. A weight of two names (tied) is averaged under both.
        """
        averages = {id(weight): average for weight, average in zip(*self._pairs(), strict=True)}
        for name, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) in averages and name in saved:
                saved[name] = averages[id(weight)].to(weight.dtype)
        trained = self._trained or [weight.detach() for weight in self.weights.values()]
        coarse = [name for name, weight in self.weights.items() if weight.itemsize < 4]
        exact = dict(zip(self.weights, self.average, strict=True))
        return {
            "steps": self.steps,
            "trained": dict(zip(self.weights, trained, strict=True)),
            "average": {name: exact[name] for name in coarse},
        }

    def _pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        return list(self.weights.values()), self.average


def restore_trained(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Put the trained weights of a checkpoint into a model that has its average."""
    trained = stored.get("trained", {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in trained:
                weight.copy_(trained[name])


class Averaged(pl.LightningModule):
    """A model whose average is validated and saved, and is what a run leaves, if its ``spec`` has a decay, ``ema``."""

    spec: dict[str, Any]
    _average: MovingAverage | None = None
    _stored_average: Mapping[str, Any] = {}

    def on_fit_start(self) -> None:
        """Refuse what averages of whole weights do not work with. Raises UserError."""
        if self.spec["ema"] is None:
            return
        if isinstance(self.trainer.strategy, FSDPStrategy) or self.device_mesh is not None:
            raise UserError(Problem("model.ema", "averages whole weights: use DDP instead of a strategy that shards"))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AVERAGING):
                text = f"{type(callback).__name__} averages the weights too: leave out one of them"
                raise UserError(Problem("model.ema", text))

    def on_train_start(self) -> None:
        """Begin the average, or continue it. A resumed run without it continues from the weights that were trained."""
        if self.spec["ema"] is None:
            restore_trained(self, self._stored_average)
        else:
            self._average = MovingAverage(self.spec["ema"], self, self._stored_average)
        self._stored_average = {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and have the average follow: before any callback can save."""
        super().optimizer_step(*args, **kwargs)
        if self._average is not None:
            self._average.update()

    def on_validation_start(self) -> None:
        """Validate the average of the weights, where there is one."""
        if self._average is not None and self.trainer.state.fn == "fit":
            self._average.put_in()

    def on_validation_end(self) -> None:
        """Put the weights that are trained back; called after the callbacks, which save."""
        if self._average is not None and self.trainer.state.fn == "fit":
            self._average.take_out()

    def on_train_end(self) -> None:
        """Leave the average in the model; called after the callbacks, which save."""
        if self._average is not None:
            self._average.put_in()
            self._average = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, and next to them what a resumed run needs."""
        if self._average is not None:
            checkpoint["ema"] = self._average.state(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what a run that is resumed needs."""
        self._stored_average = checkpoint.get("ema") or {} if self.trainer.state.fn == "fit" else {}
