"""What a run shows while it goes on and when it ends."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar

from llmkit.model.language_model import LanguageModel
from llmkit.run import figures
from llmkit.run.saving import run_folder
from llmkit.run.throughput import Throughput, Totals, memory
from llmkit.sequence import on_device

DEFAULT_VAL_INTERVAL = 500
"""Batches between two validations, at most, when the config does not say."""


def duration(seconds: float) -> str:
    """Return seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(ProgressBar):
    """One line of progress: step, loss, tokens a second, MFU, memory, time left; rewritten in place on a terminal.

    Args:
        throughput: knows how fast the run is; it stands before this one among the callbacks.
        seconds: time between two lines on a terminal; elsewhere (a log file) a line comes every ten times that.
    """

    def __init__(self, throughput: Throughput, seconds: float = 0.5) -> None:
        super().__init__()
        self.throughput, self.seconds = throughput, seconds
        self._enabled = True
        self._open_line = False

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
        """Tell what is trained."""
        assert isinstance(pl_module, LanguageModel)
        self._first_step = trainer.global_step
        self._shown = Totals()
        if self._enabled:
            counts = pl_module.network.num_parameters()
            assert pl_module.tokenizer is not None
            print(
                f"{type(pl_module.head).__name__} with {counts['total']:,} parameters "
                f"({counts['embedding']:,} in embeddings), vocabulary {pl_module.tokenizer.vocab_size:,}; "
                f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, precision {trainer.precision}",
                flush=True,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the line when it is time."""
        assert isinstance(pl_module, LanguageModel)
        now = self.throughput.meter.totals()
        tty = sys.stderr.isatty()
        due = now.seconds - self._shown.seconds >= self.seconds * (1 if tty else 10)
        if not self._enabled or not (due or trainer.global_step == trainer.max_steps):
            return
        tokens, mfu = self.throughput.rates(self._shown, now)
        self._shown = now
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        left = ""
        if total != float("inf") and step > self._first_step:
            seconds = now.seconds / (step - self._first_step) * (float(total) - step)
            left = f"  {duration(max(0.0, seconds))} left"
        of = "" if total == float("inf") else f"/{int(total)}"
        line = (
            f"step {step}{of}  loss {float(pl_module.last_loss):.4f}  {tokens:,.0f} tokens/s  MFU {mfu:.0%}"
            f"  {memory(pl_module.device):.2f} GiB{left}"
        )
        width = shutil.get_terminal_size().columns - 1  # a line that wraps is not rewritten
        print(f"\r{line[:width]:<{width}}" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)
        self._open_line = tty

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation metrics of a running fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._enabled:
            values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            text = "  ".join(f"{name} {float(value):.4f}" for name, value in values.items())
            self.print(f"step {trainer.global_step}: {text}", file=sys.stderr)

    def _end_line(self) -> None:
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the line."""
        self._end_line()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the line."""
        self._end_line()


class RunReport(Callback):
    """Writes the run folder's results and pictures, and tells where everything is."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the default validation interval to the run, so that the last validation is at its last step."""
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if trainer.val_check_interval == DEFAULT_VAL_INTERVAL and batches not in (0, float("inf")):
            trainer.val_check_batch = max(1, int(batches / math.ceil(batches / DEFAULT_VAL_INTERVAL)))

    def finish_fit(self, trainer: pl.Trainer, model: LanguageModel) -> None:
        """Print the closing report of a fit: metrics of the best checkpoint, a sample, the paths."""
        sample = self._sample(trainer, model)  # by every process: a sharded network needs them all
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        self._write_results(folder, trainer, model, "val")
        curve = folder / "loss.png"
        drawn = (folder / "metrics.csv").exists() and figures.loss_curve(folder / "metrics.csv", curve)
        if model.results:
            print("\nValidation:")
            self._print_results(model, "val")
        else:
            print("\nNo validation data: nothing was measured.")
        if sample:
            print(f"\nSample:\n{sample}")
        print("\nRun folder:")
        paths = {
            "config": folder / "config.yaml",
            "metrics": folder / "metrics.csv",
            "results": folder / "results.json",
        }
        if drawn:
            paths["loss curve"] = curve
        for path in sorted((folder / "checkpoints").glob("*.ckpt")):
            paths[f"checkpoint ({path.stem})"] = path
        for name, path in paths.items():
            if path.exists():
                print(f"  {name + ':':<20} {path}")
        best = folder / "checkpoints" / "best.ckpt"
        checkpoint = best if best.exists() else folder / "checkpoints" / "last.ckpt"
        fields = model.head.inputs
        asked = "TEXT" if len(fields) == 1 else json.dumps(dict.fromkeys(fields, "TEXT"))
        print(f"\nUse it:  llmkit infer {checkpoint} {asked!r}", flush=True)

    def finish(self, trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
        """Write and print validation or test results, and draw the confusion matrix if there is one."""
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        self._write_results(folder, trainer, model, prefix)
        self._print_results(model, prefix)
        matrix = model.results.get(f"{prefix}_confusion_matrix")
        if matrix is not None:
            path = folder / "confusion_matrix.png"
            figures.confusion_matrix(matrix.tolist(), model.head.info()["labels"], path)
            print(f"  confusion matrix: {path}")
        print(f"  results: {folder / 'results.json'}", flush=True)

    def _print_results(self, model: LanguageModel, prefix: str) -> None:
        for name, value in _scalars(model, prefix).items():
            print(f"  {name:<20} {value:.4f}" if isinstance(value, float) else f"  {name:<20} {value}")

    def _write_results(self, folder: Path, trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {f"{prefix}_{name}": value for name, value in _scalars(model, prefix).items()}
        results["precision"] = str(trainer.precision)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def _sample(self, trainer: pl.Trainer, model: LanguageModel) -> str | None:
        assert model.tokenizer is not None
        loader = trainer.val_dataloaders or trainer.train_dataloader
        batch = next(iter(loader), None) if loader else None
        if batch is None:
            return None
        batch = on_device(batch, model.device)
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            return model.head.sample(model.network, batch, model.tokenizer)


def _scalars(model: LanguageModel, prefix: str) -> dict[str, Any]:
    """Return the scalar results and, where a metric has one, the signature of how it was computed."""
    values: dict[str, Any] = {
        name.removeprefix(f"{prefix}_"): float(value)
        for name, value in model.results.items()
        if name.startswith(f"{prefix}_") and value.numel() == 1
    }
    metrics = model.val_metrics if prefix == "val" else model.test_metrics
    for name, metric in metrics.items():
        signature = getattr(metric, "signature", None)
        if callable(signature):
            values[f"{name}_signature"] = signature()
    return values
