"""A run folder as an object: figures, checkpoints, curves."""

from __future__ import annotations

import csv
import functools
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.check import settled
from llmkit.config.files import read_yaml
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.run import figures, record

if TYPE_CHECKING:
    from llmkit.run.picture import Picture


class Run:
    """What a run left in its folder; everything is read when it is asked for.

    Args:
        folder: the folder of a run, ``runs/NAME/version_N``.
        kept: whether it has to be there; a ``fast_dev_run`` leaves nothing behind.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: str | Path, kept: bool = True) -> None:
        self.folder = Path(folder)
        if kept and not self.folder.is_dir():
            raise UserError(f"{folder} is not the folder of a run")

    @property
    def results(self) -> dict[str, Any]:
        """All of ``results.json``; empty where the run has none."""
        return record.read(self.folder / record.RESULTS)

    @property
    def provenance(self) -> dict[str, Any]:
        """What made the run, ``provenance.json``: code, packages, machine, seed, duration."""
        return record.read(self.folder / record.PROVENANCE)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the best checkpoint, or those of an evaluation: ``val_loss``, ``test_accuracy``, ..."""
        return {
            name: value
            for name, value in self.results.items()
            if name.startswith(("val_", "test_")) and isinstance(value, float)
        }

    @property
    def config(self) -> dict[str, Any]:
        """The whole config, defaults included: ``config.yaml``."""
        file = self.folder / "config.yaml"
        found: dict[str, Any] = settled(read_yaml(file).tree) if file.is_file() else {}
        return found

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best value of the head's metric; None: there is none."""
        return self._checkpoint("best.ckpt")

    @property
    def last(self) -> Path | None:
        """The checkpoint of the last step; None: there is none."""
        return self._checkpoint("last.ckpt")

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the best checkpoint, or else of the last one, loaded on the CPU, ready to predict.

        Raises UserError when the run has no checkpoint.
        """
        return LanguageModel.load(self.folder)

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``, each with its step and what was logged there: ``pandas.DataFrame(history)``."""
        rows = csv.DictReader(self._text("metrics.csv").splitlines())
        found = [{name: float(value) for name, value in row.items() if value} for row in rows]
        return [{**row, "step": int(row["step"])} for row in found]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The answers of ``llmkit.predict``, a mapping for each row; an empty one for a row that is blank."""
        return [json.loads(line) for line in self._text("predictions.jsonl").splitlines()]

    def plot(self) -> Picture:
        """Return training and validation loss against the step as a figure of matplotlib, which notebooks show.

        Raises UserError when no loss was logged.
        """
        file = self.folder / "metrics.csv"
        curves, unit = figures.losses(file) if file.is_file() else ({}, "")
        if not curves:
            raise UserError(f"{self.folder} has no losses to plot")
        return figures.curves_figure(curves, unit)

    def _text(self, name: str) -> str:
        file = self.folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def _checkpoint(self, name: str) -> Path | None:
        file = self.folder / "checkpoints" / name
        return file if file.is_file() else None

    def __repr__(self) -> str:
        """The folder and the metrics: ``Run('runs/a/version_0'): val_loss 1.5847, val_perplexity 4.8779``."""
        values = ", ".join(f"{name} {_shown(value)}" for name, value in self.metrics.items())
        return f"Run({str(self.folder)!r}){values and f': {values}'}"

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the metrics, and where the checkpoints are."""
        rows = [(name, _shown(value)) for name, value in self.metrics.items()]
        rows += [(path.stem, str(path)) for path in (self.best, self.last) if path is not None]
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in rows
        )
        caption = f'<caption style="text-align:left">{html.escape(str(self.folder))}</caption>'
        return f"<table>{caption}{cells}</table>"


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1e6 else f"{value:.4g}"
