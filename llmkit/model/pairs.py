"""Minimal pairs: of two sentences that differ in one point, does a language model find the right one more probable?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llmkit.checkpoint.content import begins_with
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, evaluating
from llmkit.sequence import on_device


class Pair(NamedTuple):
    """One pair, in the words of BLiMP."""

    good: str
    bad: str
    uid: str
    """The paradigm: pairs that were made by one rule."""
    term: str
    """The phenomenon, which several paradigms belong to."""


class Accuracy(NamedTuple):
    """How many pairs of one kind were judged right."""

    name: str
    right: int
    pairs: int

    @property
    def share(self) -> float:
        """The share that is right."""
        return self.right / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share (Wilson 1927, "Probable inference")."""
        z, n, p = 1.959964, self.pairs, self.share
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file in BLiMP's JSON lines (Warstadt et al. 2020, arXiv:1912.00582).

    A line has ``sentence_good`` and ``sentence_bad``; ``UID`` and ``linguistics_term`` default to the file's name.
    Raises UserError, with the line, for anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good, bad = row["sentence_good"], row["sentence_bad"]
            uid = str(row.get("UID", path.stem))
            pair = Pair(good, bad, uid, str(row.get("linguistics_term", uid)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: expected a JSON object with sentence_good and sentence_bad") from error
        if not all(isinstance(text, str) and text.strip() for text in pair[:2]):
            raise UserError(f"{path}:{number}: sentence_good and sentence_bad should be texts that are not empty")
        yield pair


@torch.no_grad()
def judge(model: LanguageModel, pairs: Sequence[Pair], batch_size: int = 64) -> list[bool]:
    """Return for each pair whether the good sentence is the more probable one; equal is wrong.

    Probable is the whole sentence: it begins after the token that began documents in training, so that its first token
    counts too. Raises UserError when the model's head does not predict texts token by token.
    """
    head, tokenizer = model.head, model.tokenizer
    assert tokenizer is not None
    if not (isinstance(head, Scores) and head.inputs == ("text",) and not head.targets):
        raise UserError(f"{type(head).__name__} does not say how probable a text is: pairs are for generation")
    start = [] if tokenizer.around[0] else [begins_with(tokenizer, model.config)]
    texts = [text for pair in pairs for text in pair[:2]]
    rows = [[*start, *ids] for ids in tokenizer.encode_batch(texts)]
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            group = order[first : first + batch_size]
            batch = on_device(head.collate([{"ids": rows[row]} for row in group], tokenizer), model.device)
            for row, answer in zip(group, head.score(model.network, batch), strict=True):
                found[row] = answer["log_probability"]
    return [good > bad for good, bad in zip(found[::2], found[1::2], strict=True)]


def accuracies(pairs: Iterable[Pair], right: Iterable[bool], by: str) -> list[Accuracy]:
    """Return the accuracy of each ``uid`` or ``term``, in the order in which they first come."""
    counts: dict[str, list[bool]] = {}
    for pair, one in zip(pairs, right, strict=True):
        counts.setdefault(getattr(pair, by), []).append(one)
    return [Accuracy(name, sum(found), len(found)) for name, found in counts.items()]
