"""A model that reads one row and answers it: the answer, and the passes of the network behind it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkit.analysis.explain.capture import Pass, Recording
from llmkit.contracts import IGNORE, Batch, Head
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, batch_of, columns_of, evaluating
from llmkit.sequence import DecodingOptions, on_device

WRITTEN = 32
"""Most tokens that are written for a row unless the caller says otherwise: where a checkpoint would write 200, most of
the picture would be of what the model says to itself."""


@dataclass
class Reading:
    """One row as a model read it.

    Attributes:
        row: the row's fields, with the text that was written.
        answer: what the head answered; empty where the row had all of it.
        shown: the answer as a person reads it.
        batch: the batch of the row that was read.
        passes: the full passes of the network that the answer rests on, the encoder's first.
        writes: for a head that writes text, the token that each position of the decoder writes, (T,); else None.
    """

    row: Mapping[str, Any]
    answer: dict[str, Any]
    shown: str
    batch: Batch
    passes: list[Pass]
    writes: Tensor | None = None


@torch.no_grad()
def read(
    model: LanguageModel, row: str | Mapping[str, Any], options: DecodingOptions | None = None, write: bool = True
) -> Reading:
    """Return how a model reads a text or row.

    A head that writes text writes it first, unless the row has its targets, and the whole is then read in one pass.

    Args:
        model: the model.
        row: a text, or the fields of a row.
        options: how text is written; None: as the checkpoint says, but ``shortened``.
        write: whether text is written; else a row needs its targets, and a language model reads the text as it is.

    Raises UserError for a row that lacks a field, or cannot be answered.
    """
    head = model.head
    given = row if isinstance(row, Mapping) else {head.inputs[0]: row}
    columns_of([given], head.inputs)  # which refuses a row that lacks a field
    if isinstance(head, Scores):
        return _written(model, given, options, write)
    batch = row_batch(model, given, head.inputs)
    with evaluating(model):
        recording = Recording(model.network)
        (answer,) = head.predict(recording, batch, model._trained_tokenizer, head.decoding)
    return Reading(given, answer, head.show(answer), batch, recording.passes)


def shortened(options: DecodingOptions) -> DecodingOptions:
    """Return options with which a language model writes at most ``WRITTEN`` tokens; a translation is written whole."""
    most = None if options.max_new_tokens is None else min(options.max_new_tokens, WRITTEN)
    least = options.min_new_tokens if most is None else min(options.min_new_tokens, most)
    return dataclasses.replace(options, max_new_tokens=most, min_new_tokens=least)


def _written(model: LanguageModel, row: Mapping[str, Any], options: DecodingOptions | None, write: bool) -> Reading:
    head, answer, shown = model.head, dict[str, Any](), ""
    assert isinstance(head, Scores)
    missing = [name for name in head.targets if not row.get(name)]
    if not write and missing:
        shape = json.dumps(dict.fromkeys([*head.inputs, *head.targets], "..."))
        raise UserError(f"explain: nothing is to be written, so a row needs its {' and '.join(missing)}: {shape}")
    if write and (missing or not head.targets):
        options = options or shortened(model.head.decoding)
        (answer,) = model.predict([row], options)
        shown, row = model.head.show(answer), _with_answer(row, model.head, answer)
    batch = row_batch(model, row, (*head.inputs, *head.targets), unread=1)
    with evaluating(model):
        recording = Recording(model.network)
        head.score(recording, batch)
    passes = recording.passes
    if len(passes) > 1 and passes[-1].source is None:  # a text longer than the context, piece by piece
        passes = passes[-1:]
    return Reading(row, answer, shown, batch, passes, _writes(passes[-1], batch) if passes else None)


def _with_answer(row: Mapping[str, Any], head: Head, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the text that was written for it, as the head reads rows to score them."""
    field = head.inputs[0]
    if head.targets:
        return {**row, head.targets[0]: answer["text"]}
    if head.layout == "blocks":
        return {**row, field: answer["prompt"] + answer["text"]}
    return {**row, field: [*_messages(row[field]), {"role": "assistant", "content": answer["text"]}]}


def _messages(given: Any) -> list[Any]:
    """Return a conversation: a list of messages, its JSON, or what a user says."""
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except ValueError:
            parsed = None
        given = parsed if isinstance(parsed, list | dict) else [{"role": "user", "content": given}]
    return list(given["messages"] if isinstance(given, Mapping) else given)


def row_batch(model: LanguageModel, row: Mapping[str, Any], fields: tuple[str, ...], unread: int = 0) -> Batch:
    """Return the batch of a row. Of a text of a language model that is longer than the context the end is read.

    ``unread``: how many tokens at the end are only written, not read, and need no place.
    """
    head, tokenizer = model.head, model._trained_tokenizer
    if head.layout == "blocks" and head.kept == "end":
        features = {
            name: values[0] for name, values in head.encode(columns_of([row], fields), tokenizer, 10**9).items()
        }
        features["ids"] = features["ids"][-(model.context + unread - len(tokenizer.around[0])) :]
        return on_device(head.collate([features], tokenizer), model.device)
    return on_device(batch_of(head, tokenizer, model.context, [row], fields), model.device)


def _writes(last: Pass, batch: Batch) -> Tensor:
    """Return the token that each position of the decoder's pass writes, (T,)."""
    ids_T, targets = last.ids_BT[0], batch.get("targets")
    if targets is not None and targets.shape[1] == len(ids_T):
        end_1 = targets[0, -1:]
    else:
        end_1 = batch["ids"][0, len(ids_T) : len(ids_T) + 1]
    return torch.cat([ids_T[1:], end_1.clamp(min=0) if len(end_1) and int(end_1) != IGNORE else ids_T[:0]])
