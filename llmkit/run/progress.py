"""The progress line of a running fit."""

from __future__ import annotations

import datetime
import shutil
import sys
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from llmkit.errors import in_notebook
from llmkit.model.language_model import LanguageModel
from llmkit.run.throughput import Throughput, Totals, memory

NOTEBOOK = 99
"""Characters of the line in a notebook."""


def duration(seconds: float) -> str:
    """Return seconds as ``1:02:03`` or ``2:03``."""
    return str(datetime.timedelta(seconds=int(seconds))).removeprefix("0:").removeprefix("0")


class Progress(ProgressBar):
    """A line with step, loss, tokens per second, MFU, memory and time left, rewritten in place.

    A notebook has it on stdout, with the report: stderr is red there.

    Args:
        throughput: measures the speed; it comes before this callback in the trainer's list.
        seconds: time between two lines on a terminal or in a notebook; elsewhere (a log file) a line comes every ten
            times that.
    """

    def __init__(self, throughput: Throughput, seconds: float = 0.5) -> None:
        super().__init__()
        self.throughput, self.seconds = throughput, seconds
        self._enabled = True
        self._line_is_open = False

    @property
    def _stream(self) -> TextIO:
        return sys.stdout if in_notebook() else sys.stderr

    def disable(self) -> None:
        """Show nothing (every process but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print below the progress line."""
        if self._enabled:
            self._end_line()
            print(*args, **{**kwargs, "flush": True})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what is trained, and on what."""
        assert isinstance(pl_module, LanguageModel)
        assert pl_module.tokenizer is not None
        self._first_step = trainer.global_step
        self._shown = Totals()
        counts = pl_module.network.num_parameters()
        self.print(
            f"{type(pl_module.head).__name__} with {counts['total']:,} parameters "
            f"({counts['embedding']:,} in embeddings), vocabulary {pl_module.tokenizer.vocab_size:,}; "
            f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}"
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Show the line when it is time."""
        assert isinstance(pl_module, LanguageModel)
        now = self.throughput.meter.totals()
        tty = sys.stderr.isatty() or in_notebook()
        due = now.seconds - self._shown.seconds >= self.seconds * (1 if tty else 10)
        if not self._enabled or not (due or trainer.global_step == trainer.max_steps):
            return
        tokens, mfu = self.throughput.rates(self._shown, now)
        self._shown = now
        step, total = trainer.global_step, float(trainer.estimated_stepping_batches)
        of = left = ""
        if total != float("inf"):
            of = f"/{int(total)}"
            if step > self._first_step:
                seconds = now.seconds / (step - self._first_step) * (total - step)
                left = f"  {duration(max(0.0, seconds))} left"
        line = (
            f"step {step}{of}  loss {float(pl_module.last_loss):.4f}  {tokens:,.0f} tokens/s  MFU {mfu:.0%}"
            f"  {memory(pl_module.device):.2f} GiB{left}"
        )
        # A line that wraps cannot be rewritten.
        width = NOTEBOOK if in_notebook() else shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}" if tty else line, end="" if tty else "\n", file=self._stream, flush=True)
        self._line_is_open = tty

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the metrics of a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            text = "  ".join(f"{name} {float(value):.4f}" for name, value in values.items())
            self.print(f"step {trainer.global_step}: {text}", file=self._stream)

    def _end_line(self) -> None:
        if self._line_is_open:
            print(file=self._stream)
            self._line_is_open = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the line."""
        self._end_line()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the line."""
        self._end_line()
