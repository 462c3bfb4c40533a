"""Tokens as a person reads them, and what a model says at each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.contracts import Batch, Tokenizer
from llmkit.ops.writing import CUT, special_ids

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")
PIECE = re.compile(r"(.*) (\d)/\d", re.DOTALL)
"""How a token is shown that is a piece of a character."""
LONGEST = 8
"""Most tokens of one character: four bytes, and some that spell it in two steps."""


def labels(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each token, its space included.

    Tokens that only together make a character have its text and their place: ``猫 1/3``. Special tokens have names.
    """
    names = {getattr(tokenizer, f"{role}_id"): f"<{role}>" for role in reversed(ROLES)}
    special = special_ids(tokenizer)
    found: list[str] = []
    at = 0
    while at < len(ids):
        if ids[at] in special:
            found.append(names[ids[at]])
            at += 1
            continue
        size, text = _whole(tokenizer, ids, at)
        before = found[-1] if found and ids[at - 1] not in special else None
        if before is not None and size == 1:
            # Decoded on its own a token may lose the space before it.
            pair, alone = tokenizer.decode([ids[at - 1], ids[at]]), tokenizer.decode([ids[at - 1]])
            if alone and pair.startswith(alone) and CUT not in pair:
                text = pair[len(alone) :] or text
        if size == 1:
            found.append(text or f"<{ids[at]}>")
        else:
            found += [f"{text} {number}/{size}" for number in range(1, size + 1)]
        at += size
    return found


def _whole(tokenizer: Tokenizer, ids: list[int], at: int) -> tuple[int, str]:
    """Return how many tokens from here on make whole characters, and these; one that never does is what it is."""
    texts = tokenizer.decode_batch([ids[at : at + size] for size in range(1, min(LONGEST, len(ids) - at) + 1)])
    for size, text in enumerate(texts, 1):
        if text and CUT not in text:
            return size, text
        if size == 1 and not text.endswith(CUT):
            return 1, text
    return 1, texts[0]


def says(
    answer: Mapping[str, Any], batch: Batch, row: int, ids: list[int], names: list[str], mask_id: int
) -> list[str]:
    """Return what a head that writes no text says at each token, as far as its answer has a place: else empty strings.

    Tags of words, answers of a probe, guesses for masks, and the tokens of a span that is the answer.

    Args:
        answer: the head's answer.
        batch: the batch; ``words`` are the numbers of the tokens' words, (B, T).
        row: the row of the batch.
        ids: the tokens.
        names: their labels.
        mask_id: the token to guess.
    """
    said = [""] * len(ids)
    if isinstance(tags := answer.get("tags"), list) and "words" in batch:
        owners = batch["words"][row].tolist()[: len(ids)]
        return [tags[owner] if 0 <= owner < len(tags) else "" for owner in owners]
    if isinstance(answers := answer.get("answers"), str) and len(answers.split()) == len(ids):
        return answers.split()
    if isinstance(guesses := answer.get("masks"), list):
        places = [place for place, token in enumerate(ids) if token == mask_id]
        for place, guess in zip(places, guesses, strict=False):
            said[place] = str(guess[0]["token"])
        return said
    if isinstance(span := answer.get("answer"), str) and span and "words" in batch:
        owners = batch["words"][row].tolist()[: len(ids)]
        for place in _span(span, answer["start"], batch["text"][0], names, owners):
            said[place] = "answer"
    return said


def _span(span: str, start: int, context: str, names: list[str], owners: list[int]) -> range:
    """Return the tokens that spell a span of a context, of which they may be a part; none if it is not in there."""
    letters, token_of = "", list[int]()
    for place, (name, owner) in enumerate(zip(names, owners, strict=True)):
        piece = PIECE.fullmatch(name)
        text = _letters(name) if piece is None else piece[1] if piece[2] == "1" else ""
        if owner >= 0:
            letters += text
            token_of += [place] * len(text)
    skipped = _letters(context).find(letters)
    first = len(_letters(context[:start])) - skipped
    last = first + len(_letters(span)) - 1
    return range(token_of[first], token_of[last] + 1) if min(skipped, first) >= 0 and last < len(letters) else range(0)


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text).lower()
