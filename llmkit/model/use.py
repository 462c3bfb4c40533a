"""What it takes to ask a model for answers from outside a run: rows as columns, and evaluation mode for a while."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.contracts import Batch, Head, Network, Tokenizer
from llmkit.data.examples import note_truncated
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.ops.metrics import computed
from llmkit.sequence import DecodingOptions, on_device

Rows = Sequence[str] | Sequence[Mapping[str, Any]]
"""Texts, or rows with the head's fields."""


@runtime_checkable
class Scores(Protocol):
    """A head that can say how probable the model finds a text."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]

    def score(self, net: Network, batch: Batch, /) -> list[dict[str, Any]]:
        """Return the log probability of each row, with its number of tokens and perplexity."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def batch_of(
    head: Head, tokenizer: Tokenizer, context: int, rows: Rows, fields: Sequence[str], first: int = 0
) -> Batch:
    """Return texts or rows as one batch; ``first`` is the number of the first row."""
    features = head.encode(columns_of(rows, fields), tokenizer, context)
    note_truncated(head, features.get("truncated"), len(rows), context)
    items = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    return {**head.collate(items, tokenizer), "rows": torch.arange(first, first + len(rows))}


def columns_of(rows: Rows, fields: Sequence[str]) -> dict[str, list[Any]]:
    """Return rows as columns; a text stands for the first field of a row whose other fields are empty.

    Raises UserError when ``rows`` is a single text or row, or a row lacks a field.
    """
    if isinstance(rows, str | Mapping):
        raise UserError(f"predict takes a list of texts or rows, and got one {type(rows).__name__}: put it in a list")
    given = [row if isinstance(row, Mapping) else {**dict.fromkeys(fields, ""), fields[0]: row} for row in rows]
    for number, row in enumerate(given, 1):
        if missing := [name for name in fields if name not in row]:
            raise UserError(f"predict: row {number} has no {' and no '.join(missing)}; it needs {', '.join(fields)}")
    return {name: [row[name] for row in given] for name in fields} if given else {}


def with_length(options: DecodingOptions, default: DecodingOptions) -> DecodingOptions:
    """Return options with the default's ``max_new_tokens`` where they leave it open."""
    if options.max_new_tokens is not None:
        return options
    return dataclasses.replace(options, max_new_tokens=default.max_new_tokens)


class Answers(pl.LightningModule):
    """A model that is evaluated in a run, and asked from outside of one."""

    spec: dict[str, Any]
    net: Backbone | None
    tokenizer: Tokenizer | None
    head: Head
    val_metrics: nn.ModuleDict
    test_metrics: nn.ModuleDict
    results: dict[str, Tensor]

    @property
    def network(self) -> Backbone:
        """The network; raises UserError before it is built."""
        if self.net is None:
            raise UserError("the network is not built yet: fit the model, or load a checkpoint with llmkit.load")
        return self.net

    @property
    def context(self) -> int:
        """Most positions of one sequence."""
        return int(self.spec["context"])

    @property
    def _trained_tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None, "no tokenizer yet: setup takes it from the data, load from a checkpoint"
        return self.tokenizer

    @property
    def size(self) -> str:
        """The size of the vocabulary and the number of parameters, in words, once they are known."""
        if self.net is None or self.tokenizer is None:
            return ""
        return f", vocabulary {self.tokenizer.vocab_size:,}, {self.net.num_parameters()['total']:,} parameters"

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors of a batch; Lightning's own way takes 3 us for each string in it."""
        return on_device(batch, device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self.head.evaluate(self.network, batch, dict(self.val_metrics.items()), self._trained_tokenizer)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics."""
        self.head.evaluate(self.network, batch, dict(self.test_metrics.items()), self._trained_tokenizer)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, prefix: str, metrics: nn.ModuleDict) -> None:
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            for key, value in computed(f"{prefix}_{name}", metric).items():
                self.results[key] = value
                if value.numel() == 1:  # every process computed the same from all processes' sums
                    self.log(key, value.float(), rank_zero_only=False, sync_dist=False)
            metric.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one answer a row."""
        return self.head.predict(self.network, batch, self._trained_tokenizer, self.head.decoding)

    @torch.no_grad()
    def predict(
        self, rows: Rows, options: DecodingOptions | None = None, first: int = 0, **extra: Any
    ) -> list[dict[str, Any]]:
        """Return the head's answer to each text or row.

        Args:
            rows: texts, or rows with the head's input fields.
            options: how text is generated; None, or no length in it: as the checkpoint says.
            first: the number of the first row; what is sampled for a row depends on its number.
            extra: further arguments of the head's ``predict`` (``on_text`` of the generation head).

        Raises UserError when ``rows`` is not a list, a row has not all fields, or the network is not built yet.
        """
        head, network = self.head, self.network
        if not rows:
            return []
        batch = self._batch(rows, head.inputs, first)
        with evaluating(self):
            return head.predict(
                network, batch, self._trained_tokenizer, with_length(options or head.decoding, head.decoding), **extra
            )

    @torch.no_grad()
    def score(self, rows: Rows) -> list[dict[str, Any]]:
        """Return how probable the model finds each text or row, with targets; for heads that write text."""
        if not isinstance(head := self.head, Scores):
            raise UserError(f"{type(head).__name__} does not score texts: heads that write text do (generation, ...)")
        with evaluating(self):
            return head.score(self.network, self._batch(rows, (*head.inputs, *head.targets)))

    def _batch(self, rows: Rows, fields: tuple[str, ...], first: int = 0) -> Batch:
        batch = batch_of(self.head, self._trained_tokenizer, self.context, rows, fields, first)
        return on_device(batch, self.device)
