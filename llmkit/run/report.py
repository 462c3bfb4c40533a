"""The closing report of a run: results, pictures and predictions in its folder, and where they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed

from llmkit import registry
from llmkit.checkpoint.content import Stored
from llmkit.errors import Problem, UserError
from llmkit.lightning import is_debug_run
from llmkit.model.groups import trained_share
from llmkit.model.language_model import LanguageModel
from llmkit.run import figures, trackers
from llmkit.run.folder import run_folder
from llmkit.run.provenance import Provenance
from llmkit.run.record import RESULTS, read
from llmkit.run.saving import Checkpoints, write_text
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
    if not all(parameter.requires_grad for parameter in model.parameters()):
        print(f"\nTrained: {trained_share(model)}")
    if sample:
        print(f"\nSample:\n{sample}")
    others = [saver for saver in trainer.checkpoint_callbacks if not isinstance(saver, Checkpoints)]
    saved = [getattr(saver, name, "") for saver in others for name in ("best_model_path", "last_model_path")]
    _report_paths(folder, model.head.inputs, [Path(path) for path in saved if path])
    pictures = {"loss_curve": curve} if curve.exists() else {}
    trackers.send(trainer.loggers, trainer.global_step, pictures, {"sample": sample} if sample else {})


def report_finished(stored: Stored) -> None:
    """Print the report of a run that ended before, from its folder: nothing was left to train."""
    folder, step = stored.path.parent.parent, stored.content["global_step"]
    print(
        f"finished: {stored.path} is of step {step}, the last one; a larger trainer.max_steps (or max_epochs) resumes"
    )
    kept = ("precision", "provenance")
    values = {name: value for name, value in read(folder / RESULTS).items() if name not in kept}
    print("\nValidation:" if values else "\nNo validation data, so no metrics.")
    _print(values, "val")
    head: Any = registry.class_of(stored.part["model"]["head"]["class_path"], "head")
    _report_paths(folder, head.inputs)


def _report_paths(folder: Path, fields: tuple[str, ...], saved: Sequence[Path] = ()) -> None:
    """Print what is in the folder of a fit, and how to use its checkpoint, or else one of those ``saved`` elsewhere."""
    checkpoints = folder / "checkpoints"
    paths = {
        "config": folder / "config.yaml",
        "metrics": folder / "metrics.csv",
        "results": folder / RESULTS,
        "loss curve": folder / "loss.png",
        **{f"checkpoint ({path.stem})": path for path in sorted(checkpoints.glob("*.ckpt"))},
    }
    print("\nRun folder:")
    for name, path in paths.items():
        if path.exists():
            print(f"  {name + ':':<20} {path}")
    found = [path for path in (checkpoints / "best.ckpt", checkpoints / "last.ckpt", *saved) if path.exists()]
    if found:
        text = "TEXT" if len(fields) == 1 else json.dumps(dict.fromkeys(fields, "TEXT"))
        print(f"\nUse it:  llmkit infer {found[0]} {text!r}", flush=True)


def report_evaluation(trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
    """Print validation or test results, write them, and draw the confusion matrix if there is one.

    Raises UserError where nothing was evaluated.
    """
    if not model.results:
        name = {"val": "validation"}.get(prefix, prefix)
        text = f"no rows to evaluate: see data.{name} and trainer.limit_{prefix}_batches"
        raise UserError(Problem(f"data.{name}", text + (", and data.validation_share" if prefix == "val" else "")))
    if not trainer.is_global_zero:
        return
    folder = run_folder(trainer)
    _report_metrics(trainer, model, prefix)
    if is_debug_run(trainer):
        return
    matrix = model.results.get(f"{prefix}_confusion_matrix")
    if matrix is not None:
        path = folder / "confusion_matrix.png"
        figures.confusion_matrix(matrix.tolist(), model.head.info()["labels"], path)
        trackers.send(trainer.loggers, trainer.global_step, {"confusion_matrix": path}, {})
        print(f"  confusion matrix: {path}")
    print(f"  results: {folder / RESULTS}", flush=True)


class Predictions(pl.Callback):
    """Writes one JSON line per row to ``predictions.jsonl`` in the run folder, in the order of the rows.

    Of several processes each predicts every so many batches; the first process writes the answers of all.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin without answers."""
        self._batches: list[list[str]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        """Take the answers to a batch."""
        self._batches.append([json.dumps(answer, ensure_ascii=False) for answer in outputs])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file: ``{}`` for a row that is blank."""
        ranks: list[Any] = [self._batches]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size if trainer.is_global_zero else []
            distributed.gather_object(self._batches, ranks or None)
        if not trainer.is_global_zero or is_debug_run(trainer):
            return
        # Batch n was given to process n % size.
        batches = chain.from_iterable(zip_longest(*ranks, fillvalue=[]))
        lines = in_place(chain.from_iterable(batches), set(trainer.datamodule.blank_rows))  # type: ignore[attr-defined]
        path = run_folder(trainer) / "predictions.jsonl"
        write_text(path, "".join(f"{line}\n" for line in lines))
        _made_by(trainer)
        print(f"predictions: {path}")


def in_place(lines: Iterable[str], blank: set[int]) -> Iterator[str]:
    """Yield the answers, with ``{}`` where the number of a row is ``blank``."""
    number = 0
    for line in [*lines, None]:
        while number in blank:
            yield "{}"
            number += 1
        if line is not None:
            yield line
            number += 1


def _report_metrics(trainer: pl.Trainer, model: LanguageModel, prefix: str) -> None:
    """Print the results and write them to ``results.json``, unless this is a debug run.

    They are scalars and, where a metric has one, the signature of its computation.
    """
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
    if not is_debug_run(trainer):
        results = {**values, "precision": str(trainer.precision), "provenance": _made_by(trainer)}
        text = json.dumps(results, indent=2, ensure_ascii=False)
        write_text(run_folder(trainer) / RESULTS, text + "\n")
    _print(values, prefix)


def _made_by(trainer: pl.Trainer) -> dict[str, Any]:
    """Complete the record of what made a run, and return it."""
    recorder = next(item for item in trainer.callbacks if isinstance(item, Provenance))  # type: ignore[attr-defined]
    return recorder.write(trainer)


def _print(values: Mapping[str, Any], prefix: str) -> None:
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
