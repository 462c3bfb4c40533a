"""Properties of training, of the state in a checkpoint, and of copies."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

from llmkit.testing.report import NotApplicable, Properties, Violation
from llmkit.testing.tokenizer.subject import (
    CORPUS,
    NAMES,
    ODD,
    ROLES,
    UNSEEN,
    Subject,
    check_specials,
    encoded,
    same_rows,
    same_states,
)

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "a JSON state brings all of it back",
    "A checkpoint is used with other ids than it was trained with: rubbish.",
)
def state(subject: Subject) -> str:
    tokenizer = subject.ready
    text = tokenizer.to_state()
    restored = subject.factory()
    restored.from_state(text)
    if not restored.trained:
        raise Violation("after from_state 'trained' is False")
    for name in ("vocab_size", "lossless", *(f"{role}_id" for role in ROLES)):
        before, after = getattr(tokenizer, name), getattr(restored, name)
        if before != after:
            raise Violation(f"{name} is {before} before and {after} after to_state and from_state")
    texts = [*subject.texts, *UNSEEN]
    rows = encoded(tokenizer, texts)
    same_rows(texts, encoded(restored, texts), rows, "after to_state and from_state", "before")
    for row in rows:
        if tokenizer.decode(row) != restored.decode(row):
            raise Violation(
                f"ids {row} are decoded as {tokenizer.decode(row)!r}, but as {restored.decode(row)!r} after to_state "
                "and from_state"
            )
    same_states(restored.to_state(), text, "to_state after from_state differs from the state that was read")
    return f"{len(text):,} characters"


@PROPERTIES(
    "a string that is no state of it is refused with a ValueError",
    "A damaged checkpoint gives a traceback or, worse, wrong ids.",
)
def bad_state(subject: Subject) -> None:
    good = subject.ready.to_state()
    own = json.loads(good)
    bad = ["", "no JSON", good[: len(good) // 2]]
    bad += [text for text in ("null", "7", '"text"', "[]") if type(json.loads(text)) is not type(own)]
    bad += [text for text in ("{}", '{"other": 1}') if not isinstance(own, dict) or own]
    # Without one of its parts it may be refused or not, but not with another error.
    doubtful = []
    if isinstance(own, dict) and len(good) < 200_000:  # a large one takes long to read
        for name in own:
            rest = {key: value for key, value in own.items() if key != name}
            doubtful += [json.dumps(rest), json.dumps({**rest, name: None}), json.dumps({**rest, name: [1]})]
    for text in bad + doubtful:
        told = f"from_state({text!r})" if len(text) < 80 else f"from_state({text[:77]!r}...)"
        try:
            subject.factory().from_state(text)
        except ValueError:
            continue
        except Exception as error:
            raise Violation(f"{told} raised {type(error).__name__}: {error}; expected a ValueError") from error
        if text in bad:
            raise Violation(f"{told} is accepted")


@PROPERTIES(
    "it can be pickled and copied",
    "Data workers and several processes cannot be started.",
)
def copies(subject: Subject) -> None:
    texts = [*subject.texts, *UNSEEN]
    rows = encoded(subject.ready, texts)
    kinds: dict[str, Callable[[Any], Any]] = {
        "pickle": lambda item: pickle.loads(pickle.dumps(item)),
        "copy.deepcopy": copy.deepcopy,
    }
    for name, make in kinds.items():
        try:
            other = make(subject.ready)
        except Exception as error:
            raise Violation(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        same_rows(texts, encoded(other, texts), rows, f"after {name}", "before")
        check_specials(other, list(NAMES), subject.specials)  # settings of wrapped libraries get lost


@PROPERTIES(
    "training twice on the same texts gives the same tokenizer",
    "Runs cannot be repeated, and processes of one run disagree.",
)
def training_repeats(subject: Subject) -> None:
    if subject.factory().trained:
        raise NotApplicable("it comes trained")
    same_states(subject.fresh().to_state(), subject.fresh().to_state(), "a second training gives another state")


@PROPERTIES(
    "training reads an iterator once, and says so when there is nothing in it",
    "It learns nothing from a second pass over the texts, which is empty, and every word is unknown.",
)
def training_reads_once(subject: Subject) -> str:
    tokenizer, unk = subject.ready, subject.specials["unk"]
    ids = [number for row in encoded(tokenizer, CORPUS) for number in row]
    unknown = ids.count(unk) / max(1, len(ids))
    if unknown > 0.5:
        raise Violation(f"{unknown:.0%} of the ids of its own training texts are unk_id; is the iterator read twice?")
    for texts in ([], ["", ""]):
        try:
            subject.fresh(texts)
        except ValueError:
            continue
        except Exception as error:
            raise Violation(
                f"train on {texts} raised {type(error).__name__}: {error}; expected a ValueError (UserError) that says "
                "there is no text"
            ) from error
    return f"{unknown:.1%} of its training texts is unknown to it"


@PROPERTIES(
    "encoding and decoding change nothing",
    "The ids of a text depend on the texts before it.",
)
def encoding_keeps_state(subject: Subject) -> None:
    tokenizer = subject.fresh()
    before, size = tokenizer.to_state(), tokenizer.vocab_size
    first = encoded(tokenizer, subject.texts)
    encoded(tokenizer, [*ODD[:3], *UNSEEN, "entirely new words: xylophon, qwrtz"])
    tokenizer.decode_batch(first)
    same_states(tokenizer.to_state(), before, "the state is another one after texts were encoded")
    if tokenizer.vocab_size != size:
        raise Violation(f"vocab_size was {size}, and is {tokenizer.vocab_size} after texts were encoded")
    same_rows(subject.texts, encoded(tokenizer, subject.texts), first, "after other texts", "before them")
