"""The closing report of a run: results, pictures and predictions in its folder, and where they are."""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed

from llmkit.model.language_model import LanguageModel
from llmkit.run import figures
from llmkit.run.saving import run_folder, write_whole
from llmkit.sequence import on_device


def report_fit(trainer: pl.Trainer, model: LanguageModel) -> None:
    """Print the closing report of a fit: metrics of the best checkpoint, a sample, the paths."""
    sample = _sample(trainer, model)  # on every process: a sharded network needs all of them
    if not trainer.is_global_zero:
        return
    folder = run_folder(trainer)
    metrics, curve = folder / "metrics.csv", folder / "loss.png"
    if metrics.exists():
        figures.loss_curve(metrics, curve)
    print("\nValidation:" if model.results else "\nNo validation data, so no metrics.")
    _report_metrics(trainer, model, "val")
    if sample:
        print(f"\nSample:\n{sample}")
    checkpoints = folder / "checkpoints"
    paths = {
        "config": folder / "config.yaml",
        "metrics": metrics,
        "results": folder / "results.json",
        "loss curve": curve,
        **{f"checkpoint ({path.stem})": path for path in sorted(checkpoints.glob("*.ckpt"))},
    }
    print("\nRun folder:")
    for name, path in paths.items():
        if path.exists():
            print(f"  {name + ':':<20} {path}")
    best = checkpoints / "best.ckpt"
    fields = model.head.inputs
    text = "TEXT" if len(fields) == 1 else json.dumps(dict.fromkeys(fields, "TEXT"))
    print(f"\nUse it:  llmkit infer {best if best.exists() else checkpoints / 'last.ckpt'} {text!r}", flush=True)


def report_evaluation(trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
    """Write and print validation or test results, and draw the confusion matrix if there is one."""
    if not trainer.is_global_zero:
        return
    folder = run_folder(trainer)
    _report_metrics(trainer, model, prefix)
    matrix = model.results.get(f"{prefix}_confusion_matrix")
    if matrix is not None:
        path = folder / "confusion_matrix.png"
        figures.confusion_matrix(matrix.tolist(), model.head.info()["labels"], path)
        print(f"  confusion matrix: {path}")
    print(f"  results: {folder / 'results.json'}", flush=True)


class Predictions(pl.Callback):
    """Writes one JSON line per row to ``predictions.jsonl`` in the run folder, in the order of the rows.

    Of several processes each predicts every so many batches; the first process writes the answers of all.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin without answers."""
        self._batches: list[str] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        """Take the answers to a batch."""
        self._batches.append("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in outputs))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        ranks: list[Any] = [self._batches]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size if trainer.is_global_zero else []
            distributed.gather_object(self._batches, ranks or None)
        if not trainer.is_global_zero:
            return
        # Batch n was given to process n % size.
        lines = "".join(chain.from_iterable(zip_longest(*ranks, fillvalue="")))
        path = run_folder(trainer) / "predictions.jsonl"

        def write(part: Path) -> None:
            part.write_text(lines, encoding="utf-8")

        write_whole(path, write)
        print(f"predictions: {path}")


def _report_metrics(trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
    """Write ``results.json`` and print it: scalars and, where a metric has one, the signature of its computation."""
    values: dict[str, Any] = {
        name: float(value)
        for name, value in model.results.items()
        if name.startswith(f"{prefix}_") and value.numel() == 1
    }
    metrics = model.val_metrics if prefix == "val" else model.test_metrics
    for name, metric in metrics.items():
        signature = getattr(metric, "signature", None)
        if callable(signature) and f"{prefix}_{name}" in values:
            values[f"{prefix}_{name}_signature"] = signature()
    folder = run_folder(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    results = {**values, "precision": str(trainer.precision)}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"  {name.removeprefix(f'{prefix}_'):<20} {shown}")


def _sample(trainer: pl.Trainer, model: LanguageModel) -> str | None:
    assert model.tokenizer is not None
    loader = trainer.val_dataloaders or trainer.train_dataloader
    batch = next(iter(loader), None) if loader else None
    if batch is None:
        return None
    batch = on_device(batch, model.device)
    model.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return model.head.sample(model.network, batch, model.tokenizer)
