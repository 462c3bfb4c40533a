"""Properties of training, of the state in a checkpoint, and of copies."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

from llmkit.testing.report import NotApplicable, Properties, Violation, raised
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
    "its JSON state restores everything",
    "A loaded checkpoint gets other ids than it was trained with, and its output is useless.",
)
def state(subject: Subject) -> str:
    tokenizer = subject.ready
    text = tokenizer.to_state()
    restored = subject.factory()
    restored.from_state(text)
    if not restored.trained:
        raise Violation("after from_state, 'trained' is False")
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
    "a string that is not its state is rejected with a ValueError",
    "A damaged checkpoint causes a traceback or, worse, wrong ids.",
)
def bad_state(subject: Subject) -> None:
    good = subject.ready.to_state()
    own = json.loads(good)
    bad = ["", "not JSON", good[: len(good) // 2]]
    bad += [text for text in ("null", "7", '"text"', "[]") if type(json.loads(text)) is not type(own)]
    bad += [text for text in ("{}", '{"other": 1}') if not isinstance(own, dict) or own]
    # Without one of its parts it may be accepted or rejected, but only with a ValueError.
    doubtful = []
    if isinstance(own, dict) and len(good) < 200_000:  # a large one takes long to read
        for name in own:
            rest = {key: value for key, value in own.items() if key != name}
            doubtful += [json.dumps(rest), json.dumps({**rest, name: None}), json.dumps({**rest, name: [1]})]
    for text in bad + doubtful:
        call = f"from_state({text!r})" if len(text) < 80 else f"from_state({text[:77]!r}...)"
        try:
            subject.factory().from_state(text)
        except ValueError:
            continue
        except Exception as error:
            raise Violation(f"{call} {raised(error)}; expected a ValueError") from error
        if text in bad:
            raise Violation(f"{call} is accepted")


@PROPERTIES(
    "it can be pickled and copied",
    "Data loading workers and distributed processes cannot be started.",
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
            raise Violation(f"{name} {raised(error)}") from error
        same_rows(texts, encoded(other, texts), rows, f"after {name}", "before")
        check_specials(other, list(NAMES), subject.specials)  # wrapped libraries lose settings when pickled


@PROPERTIES(
    "training twice on the same texts gives the same tokenizer",
    "Runs are not reproducible, and the processes of one run disagree.",
)
def training_repeats(subject: Subject) -> None:
    if subject.factory().trained:
        raise NotApplicable("it is pretrained")
    same_states(subject.fresh().to_state(), subject.fresh().to_state(), "a second training gives a different state")


@PROPERTIES(
    "training reads its iterator once, and raises a clear error when it is empty",
    "A second pass over the texts yields nothing, so that every word becomes unknown.",
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
            message = f"train on {texts} {raised(error)}; expected a UserError that says there is no text"
            raise Violation(message) from error
    return f"{unknown:.1%} of its training texts is unknown"


@PROPERTIES(
    "encoding and decoding do not change it",
    "The ids of a text depend on the texts encoded before it.",
)
def encoding_keeps_state(subject: Subject) -> None:
    tokenizer = subject.fresh()
    before, size = tokenizer.to_state(), tokenizer.vocab_size
    first = encoded(tokenizer, subject.texts)
    encoded(tokenizer, [*ODD[:3], *UNSEEN, "entirely new words: xylophon, qwrtz"])
    tokenizer.decode_batch(first)
    same_states(tokenizer.to_state(), before, "encoding texts changes the state")
    if tokenizer.vocab_size != size:
        raise Violation(f"encoding texts changes vocab_size from {size} to {tokenizer.vocab_size}")
    same_rows(subject.texts, encoded(tokenizer, subject.texts), first, "after other texts", "before them")
