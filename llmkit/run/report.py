"""The closing report of a run: results, pictures and predictions in its folder, and where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from llmkit.lightning import set_validation_interval
from llmkit.model.language_model import LanguageModel
from llmkit.run import figures
from llmkit.run.saving import run_folder
from llmkit.sequence import on_device

DEFAULT_VAL_INTERVAL = 500
"""Batches between two validations, at most, when the config does not set them."""


class RunReport(Callback):
    """Writes results and pictures into the run folder, and prints the closing report."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the default validation interval to the run, so that the last step is validated.

        1,200 batches are validated every 400 (not at 500 and 1,000, with the last 200 unseen).
        """
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if trainer.val_check_interval == DEFAULT_VAL_INTERVAL and batches not in (0, float("inf")):
            set_validation_interval(trainer, max(1, int(batches / math.ceil(batches / DEFAULT_VAL_INTERVAL))))

    def finish_fit(self, trainer: pl.Trainer, model: LanguageModel) -> None:
        """Print the closing report of a fit: metrics of the best checkpoint, a sample, the paths."""
        sample = self._sample(trainer, model)  # on every process: a sharded network needs all of them
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        self._write_results(folder, trainer, model, "val")
        metrics, curve = folder / "metrics.csv", folder / "loss.png"
        drawn = metrics.exists() and figures.loss_curve(metrics, curve)
        if model.results:
            print("\nValidation:")
            self._print_results(model, "val")
        else:
            print("\nNo validation data: nothing was measured.")
        if sample:
            print(f"\nSample:\n{sample}")
        paths = {"config": folder / "config.yaml", "metrics": metrics, "results": folder / "results.json"}
        if drawn:
            paths["loss curve"] = curve
        checkpoints = folder / "checkpoints"
        paths |= {f"checkpoint ({path.stem})": path for path in sorted(checkpoints.glob("*.ckpt"))}
        print("\nRun folder:")
        for name, path in paths.items():
            if path.exists():
                print(f"  {name + ':':<20} {path}")
        best = checkpoints / "best.ckpt"
        fields = model.head.inputs
        text = "TEXT" if len(fields) == 1 else json.dumps(dict.fromkeys(fields, "TEXT"))
        print(f"\nUse it:  llmkit infer {best if best.exists() else checkpoints / 'last.ckpt'} {text!r}", flush=True)

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

    def write_predictions(self, trainer: pl.Trainer, batches: list[Any]) -> None:
        """Write one JSON line per answer to ``predictions.jsonl`` in the run folder."""
        if not trainer.is_global_zero:
            return
        path = run_folder(trainer) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for batch in batches for answer in batch)
        print(f"predictions: {path}")

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
