"""Chains of compression methods as they are written, ``svd50+int8``, and a model that goes through one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkit import registry
from llmkit.compression import Calibration, Compression
from llmkit.contracts import Batch
from llmkit.errors import UserError, unknown
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Rows, batch_of, evaluating
from llmkit.sequence import on_device

BATCH = 16
"""Rows that a model is calibrated on at a time."""


@dataclass(frozen=True)
class Link:
    """One method of a chain."""

    text: str
    """As it was written: ``svd50``."""
    spec: dict[str, Any]
    """The plugin with its arguments, as plain data."""

    def method(self) -> Compression:
        """Return the method. Raises UserError for arguments out of range."""
        try:
            method: Compression = registry.factory_of(self.spec, "compression")()
        except ValueError as error:
            raise UserError(f"compression '{self.text}': {error}") from error
        return method


def parse(text: str) -> list[Link]:
    """Return the methods of a chain. Raises UserError for an unknown one, with the nearest names."""
    return [_link(part) for part in text.split("+")]


def _link(text: str) -> Link:
    """Return a method by its name and what stands after it: the longest name that the text begins with."""
    known = registry.entries("compression")
    fitting = [name for name in known if text.startswith(name)]
    if not fitting:
        raise UserError(unknown("compression", text, known))
    name = max(fitting, key=len)
    cls: Any = known[name].load()
    try:
        arguments = cls.arguments(text[len(name) :])
    except (UserError, ValueError) as error:
        raise UserError(f"compression '{text}': {name} {error}") from error
    link = Link(text, {"class_path": known[name].class_path, "init_args": arguments})
    link.method()
    return link


def reads(chain: Sequence[Link]) -> bool:
    """Return whether a method of a chain needs rows of the data."""
    return any(link.method().reads for link in chain)


def compress(
    model: LanguageModel | str | Path, methods: str | Sequence[Link], rows: Rows | None = None
) -> LanguageModel:
    """Return a compressed copy of a model, ready to predict; ``llmkit.run.saving.save_model`` writes it.

    Args:
        model: a model, or a checkpoint or run folder.
        methods: a method, or a chain of them: ``int8``, ``svd50+int8``.
        rows: texts or rows with the head's fields, targets too, of the training data, for methods that calibrate.

    Raises UserError for an unknown method, one that needs rows and gets none, or a model that it cannot compress.
    """
    new = LanguageModel.load(model) if isinstance(model, str | Path) else model
    batches = None if rows is None else _batches(new, rows)
    return apply(new, parse(methods) if isinstance(methods, str) else methods, batches)


def apply(model: LanguageModel, chain: Sequence[Link], batches: Sequence[Batch] | None) -> LanguageModel:
    """Return a compressed copy of a model; ``batches``: the training rows that methods may read."""
    new = copy.deepcopy(model).eval()
    rows = None if batches is None else calibration_of(new, batches)
    for link in chain:
        method = link.method()
        if method.reads and rows is None:
            raise UserError(f"compression '{link.text}' needs rows of the training data to calibrate with")
        parts = nn.ModuleDict({"net": new.network, "head": new.head})
        try:
            with torch.no_grad():
                made = method.apply(parts, rows if method.reads else None)
        except UserError as error:
            raise UserError(f"compression '{link.text}': {error}") from error
        new.compression = [*new.compression, {"method": link.spec, "made": made}]
    return new.eval().requires_grad_(False)


def _batches(model: LanguageModel, rows: Rows) -> list[Batch]:
    assert model.tokenizer is not None
    fields = (*model.head.inputs, *model.head.targets)
    return [
        batch_of(model.head, model.tokenizer, model.context, rows[first : first + BATCH], fields, first)
        for first in range(0, len(rows), BATCH)
    ]


def calibration_of(model: LanguageModel, batches: Sequence[Batch]) -> Calibration:
    """Return batches of a model's rows as what a method calibrates with."""

    @torch.no_grad()
    def loss() -> float:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in batches:
                found = model.head.loss(model.network, on_device(batch, model.device))
                total, count = total + float(found.total), count + int(found.count)
        return total / max(count, 1)

    return Calibration(loss, sum(len(batch["rows"]) if "rows" in batch else len(batch["ids"]) for batch in batches))
