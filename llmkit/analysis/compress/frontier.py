"""The frontier of a model and its compressed forms: what each costs, what it loses, and what is not gained."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.analysis.compress import measure
from llmkit.analysis.compress.chain import BATCH, Link, apply, reads
from llmkit.analysis.compress.measure import SIZES, paired
from llmkit.contracts import Batch, Stage
from llmkit.data.examples import Examples
from llmkit.data.module import DataModule
from llmkit.data.tokens import Blocks
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.run.saving import save_model

ORIGINAL = "original"
SMALLER = 0.97
"""A file that is larger than this share of the original's counts as not smaller."""
COLUMNS = (
    *("name", "bytes", "bytes_ratio", "peak", "held"),
    *(f"ms_{size}{part}" for size in SIZES for part in ("", "_ratio", "_low", "_high")),
    *("loss", "difference", "low", "high", "notes"),
)
"""The columns of frontier.csv."""


def frontier(
    model: LanguageModel,
    chains: Mapping[str, Sequence[Link]],
    more: Mapping[str, LanguageModel],
    data: DataModule,
    folder: Path,
    *,
    rows: int,
    calibration: int,
    rounds: int,
    memory: bool,
    imports: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Compress a model in several ways, write a checkpoint of each, and return what was measured.

    Args:
        model: the model, loaded.
        chains: the methods of each form by its name.
        more: other models by name, which are measured on the same rows: a student, a form that was trained further.
        data: prepared for the model's head.
        folder: gets ``original.ckpt``, the model without its optimizer, and a checkpoint for each chain.
        rows: how many rows of the test data (without them, of validation) the losses are compared on.
        calibration: how many rows of the training data methods may read.
        rounds: how often times are measured.
        memory: whether a process is started for each to measure its memory.
        imports: plugin files that such a process needs.
        log: is given a line before each step.

    Raises UserError when a method cannot be applied, another model reads or answers in other tokens or labels, or there
    are no rows to compare on.
    """
    for name, one in more.items():
        _check_same(name, one, model)
    stage, split = _evaluated(data)
    picked = measure.chosen(split, rows)
    read = _calibration(data, calibration) if any(map(reads, chains.values())) else None
    models: dict[str, LanguageModel] = {ORIGINAL: model}
    for name, chain in chains.items():
        log(name)
        models[name] = apply(model, chain, read)
    models |= more
    for name, one in models.items():
        save_model(one, folder / f"{name}.ckpt")
    log(f"losses of {len(picked)} {stage} rows")
    batches = [split[row] for row in picked]
    lost = {name: measure.losses(one, batches) for name, one in models.items()}
    spent = {}
    for size in SIZES:
        log(f"times at batch {size}")
        runs = {name: measure.answering(one, split, picked[0], size) for name, one in models.items()}
        spent[size] = measure.times(runs, rounds)
    settings = []
    for name, one in models.items():
        if memory:
            log(f"memory of {name}")
        held = measure.memory(folder / f"{name}.ckpt", imports) if memory else {"peak": None, "held": None}
        values: dict[str, Any] = {"file": f"{name}.ckpt", "bytes": (folder / f"{name}.ckpt").stat().st_size, **held}
        values["loss"] = float(np.nanmean(lost[name]))
        mean, half = paired(lost[name], lost[ORIGINAL])
        values |= {"difference": mean, "low": mean - half, "high": mean + half}
        for size in SIZES:
            ratio, spread = paired(np.log(spent[size][name]), np.log(spent[size][ORIGINAL]))
            ends = {"_ratio": ratio, "_low": ratio - spread, "_high": ratio + spread}
            values |= {f"ms_{size}{end}": float(np.exp(value)) for end, value in ends.items()}
            values[f"ms_{size}"] = float(np.median(spent[size][name]))
        made = [str(step["made"]["note"]) for step in one.compression if "note" in step["made"]]
        settings.append(measure.facts(name, {**values, "made": made}))
    original = settings[0]
    for one_setting in settings:
        one_setting["bytes_ratio"] = one_setting["bytes"] / original["bytes"]
        one_setting["notes"] = _notes(one_setting, original) if one_setting is not original else []
    return {
        "rows": len(picked),
        "stage": stage,
        "unit": "token" if measure.writes(model) else "row",
        "rounds": rounds,
        "calibration": 0 if read is None else calibration,
        "settings": settings,
    }


def _check_same(name: str, one: LanguageModel, model: LanguageModel) -> None:
    """Raise UserError unless a model takes the batches of another: by its tokenizer, head, labels and context."""
    assert one.tokenizer is not None and model.tokenizer is not None
    same = {
        "tokenizer": one.tokenizer.to_state() == model.tokenizer.to_state(),
        "head": type(one.head) is type(model.head) and one.head.info() == model.head.info(),
        "context": one.context >= model.context,
    }
    for what, fits in same.items():
        if not fits:
            differs = "is shorter than" if what == "context" else "is not"
            raise UserError(f"compress: --more {name}: its {what} {differs} that of the checkpoint")


def _evaluated(data: DataModule) -> tuple[str, Blocks | Examples]:
    """Return the stage that losses are compared on, and its rows: the test data if there are any."""
    stages: tuple[Stage, ...] = ("test", "validation")
    stage: Stage = next((stage for stage in stages if data._corpus.has(stage)), "train")
    return stage, data.split(stage)


def _calibration(data: DataModule, count: int) -> list[Batch]:
    split = data.split("train")
    rows = np.concatenate(measure.chosen(split, count))
    return [split[rows[first : first + BATCH]] for first in range(0, len(rows), BATCH)]


def _notes(one: Mapping[str, Any], original: Mapping[str, Any]) -> list[str]:
    """Return what a compressed model does not gain, and what its methods have to say."""
    found = [] if one["bytes_ratio"] < SMALLER else ["not smaller on disk"]
    if one["held"] is not None and one["held"] >= original["held"] * SMALLER:
        found.append("not smaller in memory")
    slow = [size for size in SIZES if one[f"ms_{size}_high"] is None or one[f"ms_{size}_high"] >= 1]
    if len(slow) == len(SIZES):
        found.append("not faster")
    elif slow:
        found.append(f"not faster at batch {slow[0]}")
    return [*found, *one["made"]]


def best(settings: Sequence[Mapping[str, Any]], cost: str) -> list[str]:
    """Return the names of those that no other is at most as costly and at most as bad as, and better in one of them."""
    known = [one for one in settings if one[cost] is not None and one["loss"] is not None]

    def beaten(one: Mapping[str, Any]) -> bool:
        return any(
            other[cost] <= one[cost] and other["loss"] <= one["loss"]
            and (other[cost] < one[cost] or other["loss"] < one["loss"])
            for other in known
        )  # fmt: skip

    return [one["name"] for one in known if not beaten(one)]


def as_csv(results: Mapping[str, Any]) -> str:
    """Return the table of a frontier."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(COLUMNS)
    for one in results["settings"]:
        table.writerow("; ".join(one[key]) if key == "notes" else one[key] for key in COLUMNS)
    return buffer.getvalue()
