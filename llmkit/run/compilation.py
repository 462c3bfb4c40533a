"""What torch.compile does in a run: how long the network takes, and whether it has to begin again later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from llmkit.errors import Problem, UserError, note


class Compilation(pl.Callback):
    """Notes that the first step compiles the network, how long that took, and each step that compiles it again.

    What is new about such a step, mostly the shape of its batch, costs as long as the first compilation did.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse CUDA graphs elsewhere: torch would leave them out in silence."""
        device = trainer.strategy.root_device.type
        if getattr(pl_module, "spec", {}).get("compile") == "reduce-overhead" and device != "cuda":
            text = f"reduce-overhead makes CUDA graphs, and this run is on {device}: use true or false"
            raise UserError(Problem("model.compile", text))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen, if this run compiles anything."""
        self._stop: Callable[[], None] | None = None
        self._seconds, self._began, self._first = 0.0, 0.0, True
        if getattr(pl_module, "spec", {}).get("compile") and trainer.is_global_zero:
            note("the first step compiles the network, which takes a minute or more (model.compile)")
            self._stop = watch_compiler(self._begin, self._end)

    def _begin(self) -> None:
        self._began = time.monotonic()

    def _end(self) -> None:
        self._seconds += time.monotonic() - self._began

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Note what this step compiled."""
        if self._stop is None or not self._seconds:
            return
        taken = f"{self._seconds:.0f} s"
        if self._first:
            note(f"the network is compiled, which took {taken}")
        else:
            why = recompile_reason()
            note(f"step {trainer.global_step} compiled the network again, which took {taken}{why and f' ({why})'}")
        self._seconds, self._first = 0.0, False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening."""
        if getattr(self, "_stop", None) is not None:
            self._stop()  # type: ignore[misc]
            self._stop = None


# torch has no public way to learn that it compiles: these two functions are all that llmkit relies on.


def watch_compiler(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Have torch.compile call two functions before and after it compiles anything; returns what ends that."""
    from torch._dynamo.callback import callback_handler  # half a second that only runs with a compiler need

    def started(*details: Any) -> None:
        begin()

    def ended(*details: Any) -> None:
        end()

    callback_handler.register_start_callback(started)
    callback_handler.register_end_callback(ended)

    def stop() -> None:
        callback_handler.remove_start_callback(started)
        callback_handler.remove_end_callback(ended)

    return stop


def recompile_reason() -> str:
    """Return why torch.compile compiled a function again the last time; empty where it does not say."""
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [getattr(metrics, "recompile_reason", None) for metrics in get_compilation_metrics()]
    return " ".join(next((reason for reason in reversed(reasons) if reason), "").split())[:200]
