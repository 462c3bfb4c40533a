"""What one answer of a model rests on: its texts, token by token, and a map for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmkit.analysis.explain import maps, tokens
from llmkit.analysis.explain.capture import Pass
from llmkit.analysis.explain.maps import Map
from llmkit.analysis.explain.reading import Reading, read
from llmkit.contracts import IGNORE, Tokenizer
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Rows, evaluating
from llmkit.sequence import DecodingOptions

FULL = 256
"""Longest text whose JSON has all weights; of longer ones it has the largest of each position."""
LARGEST = 16


@dataclass(frozen=True)
class Text:
    """One sequence of tokens that a stack of the network read.

    Attributes:
        name: what it is: ``text``, ``source``, ``target``, ``window 2``.
        tokens: the tokens.
        says: what the model says at each of them: the token that it writes next, a tag, an answer; or nothing.
        writes: whether ``says`` are tokens that a decoder writes, each of which rests on what was read before it.
        written: the first token in ``says`` that the model chose itself; all before it were given.
    """

    name: str
    tokens: list[str]
    says: list[str]
    writes: bool = False
    written: int = 0


@dataclass(frozen=True)
class Explanation:
    """What one answer rests on.

    Attributes:
        row: the row's fields, with the text that was written.
        answer: what the head answered; empty where nothing was asked of it.
        shown: the answer as a person reads it.
        texts: the sequences that were read.
        maps: the maps, encoder first, layer by layer.
        contributions: what each token contributes, by method; see ``contributions``.
    """

    row: Mapping[str, Any]
    answer: dict[str, Any]
    shown: str
    texts: list[Text]
    maps: list[Map]
    contributions: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON-able data; weights have four digits, long texts the largest of each position."""
        return {
            "row": dict(self.row),
            "answer": self.answer,
            "texts": [vars(text) for text in self.texts],
            "maps": [
                {**{name: value for name, value in vars(one).items() if name != "weights_HTS"}, **_numbers(one)}
                for one in self.maps
            ],
            "contributions": self.contributions,
        }


def explain(
    model: LanguageModel, rows: Rows, *, options: DecodingOptions | None = None, write: bool = True
) -> list[Explanation]:
    """Return what a model's answers rest on, a row at a time.

    Args:
        model: a model from ``llmkit.load``.
        rows: texts, or rows with the head's input fields. A row of a head that writes text may have its targets too:
            these are explained then.
        options: how text is written; None: as the checkpoint says, but a language model writes at most 32 tokens.
        write: whether text is written; False: a language model reads each text as it is.

    Raises UserError when a row lacks a field, or has nothing to read.
    """
    found = []
    for row in rows:
        reading = read(model, row, options, write)
        with evaluating(model):
            found.append(explanation(reading, model))
    return found


def explanation(reading: Reading, model: LanguageModel) -> Explanation:
    """Return what the answer to a row that was read rests on."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts: list[Text] = []
    found: list[Map] = []
    numbers: dict[tuple[int, int], int] = {}  # pass and row -> its text
    for done in reading.passes:
        for row in range(len(done.ids_BT)):
            key = numbers[id(done), row] = len(texts)
            texts.append(_text(done, row, reading, tokenizer))
            source = numbers[id(done.source), row] if done.source is not None else key
            found += [maps.of(part, row, key, source if part.kind == "cross" else key) for part in done.parts]
    return Explanation(reading.row, reading.answer, reading.shown, texts, found)


def _text(done: Pass, row: int, reading: Reading, tokenizer: Tokenizer) -> Text:
    ids_T, some = done.ids_BT[row], maps.real(done.seq, row)
    ids: list[int] = (ids_T if some is None else ids_T[some]).tolist()
    names = tokens.labels(tokenizer, ids)
    paired = any(one.source is not None for one in reading.passes)
    name = ("target" if done.stack == "decoder" else "source") if paired else "text"
    if len(done.ids_BT) > 1:
        name = f"window {row + 1}"
    if done.stack == "decoder" and reading.writes is not None:
        next_ids: list[int] = reading.writes.tolist()
        return Text(
            name, names, tokens.labels(tokenizer, [*ids[:1], *next_ids])[1:], True, _given(ids, reading, tokenizer)
        )
    says = tokens.says(reading.answer, reading.batch, row, ids, names, tokenizer.mask_id)
    return Text(name, names, says)


def _given(ids: list[int], reading: Reading, tokenizer: Tokenizer) -> int:
    """Return how many of the tokens that a decoder's positions write were given, not chosen."""
    if not reading.answer:
        return len(ids)
    targets = reading.batch.get("targets")
    if targets is not None and targets.shape[1] == len(ids):
        return int((targets[0] == IGNORE).sum())
    whole, prompt = (
        len(tokenizer.encode(text)) for text in (next(iter(reading.row.values())), reading.answer["prompt"])
    )
    return max(0, len(ids) - (whole - prompt))


def _numbers(one: Map) -> dict[str, Any]:
    if max(one.weights_HTS.shape[1:]) <= FULL:
        return {"weights": [[[_short(w) for w in row] for row in head] for head in one.weights_HTS.tolist()]}
    found = []
    for head_TS in one.weights_HTS:
        places_TK: Tensor = head_TS.abs().topk(min(LARGEST, head_TS.shape[1]), -1).indices.sort(-1).values
        values_TK = torch.gather(head_TS, 1, places_TK)
        both = zip(places_TK.tolist(), values_TK.tolist(), strict=True)
        found.append([[[place, _short(w)] for place, w in zip(*pair, strict=True)] for pair in both])
    return {"largest": found}


def _short(weight: float) -> float:
    return float(f"{weight:.4g}")
