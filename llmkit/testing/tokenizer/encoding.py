"""Properties of encoding and decoding."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from llmkit.contracts import Tokenizer
from llmkit.testing.report import Properties, Violation, raised
from llmkit.testing.tokenizer.subject import (
    NAMES,
    ODD,
    ROLES,
    UNSEEN,
    Subject,
    check_range,
    check_specials,
    encoded,
    same_rows,
    shrunk,
)

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "it can be built and trained, and its state is JSON",
    "A config that names it stops before training, or at the first checkpoint.",
    essential=True,
)
def builds(subject: Subject) -> str:
    tokenizer = subject.factory()
    before = tokenizer.trained
    tokenizer = subject.ready
    size = tokenizer.vocab_size
    if tokenizer.trained is not True or type(before) is not bool:
        raise Violation(
            f"'trained' is {before!r} when built and {tokenizer.trained!r} after train; expected a bool, then True"
        )
    if type(size) is not int or size < 1:
        raise Violation(f"vocab_size is {size!r}, expected a positive int")
    text = tokenizer.to_state()
    if not isinstance(text, str):
        raise Violation(f"to_state returned {type(text).__name__}, expected a JSON string")
    try:
        json.loads(text)
    except ValueError as error:
        raise Violation(f"to_state returned {text[:60]!r}, which is not JSON: {error}") from error
    return f"{size:,} ids, {'pretrained' if before else 'learned'}"


@PROPERTIES(
    "ids are ints below vocab_size",
    "The embedding is indexed out of range: a crash, with an obscure message on a GPU.",
    essential=True,
)
def ids_in_range(subject: Subject) -> None:
    size = subject.ready.vocab_size
    check_range(subject.ready, subject.texts)
    for role, number in subject.specials.items():
        if not 0 <= number < size:
            raise Violation(f"vocab_size is {size}, but {role}_id is {number}")


@PROPERTIES(
    "any text can be encoded; unknown characters become the unknown token or bytes",
    "One odd character in a file stops a long preparation, or silently disappears.",
    essential=True,
)
def any_text(subject: Subject) -> str:
    tokenizer, unk = subject.ready, subject.specials["unk"]
    if tokenizer.encode("") != [] or tokenizer.decode([]) != "":
        raise Violation(
            f"'' is encoded as {tokenizer.encode('')}, [] is decoded as {tokenizer.decode([])!r}; expected [] and ''"
        )
    for text in ODD + UNSEEN:
        try:
            check_range(tokenizer, [text])
            tokenizer.decode(tokenizer.encode(text))
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{text!r} {raised(error)}") from error
    for text in UNSEEN[:-1]:
        if not tokenizer.encode(text):
            raise Violation(f"{text!r} is encoded as [], expected unk_id ({unk}) or bytes")
    return "unknown characters become unk_id" if unk in tokenizer.encode(UNSEEN[0]) else "no character is unknown"


@PROPERTIES(
    "a text is encoded the same alone and in any batch",
    "The same text has different ids in training and in use.",
    essential=True,
)
def batches(subject: Subject) -> None:
    tokenizer = subject.ready
    if tokenizer.encode_batch([]) != [] or tokenizer.decode_batch([]) != []:
        raise Violation("an empty batch does not return an empty list")
    texts = [*subject.texts, *UNSEEN, subject.texts[0]]
    alone = [encoded(tokenizer, [text])[0] for text in texts]
    same_rows(texts, encoded(tokenizer, texts), alone, "in a batch", "alone")
    same_rows(texts, encoded(tokenizer, texts[::-1])[::-1], alone, "in a batch in reverse order", "alone")
    for text, row in zip(texts, alone, strict=True):
        if tokenizer.encode(text) != row:
            raise Violation(f"{text!r}: encode returns {tokenizer.encode(text)}, encode_batch {row}")
    decoded, one_by_one = tokenizer.decode_batch(alone), [tokenizer.decode(row) for row in alone]
    for row, together, single in zip(alone, decoded, one_by_one, strict=True):
        if together != single:
            raise Violation(f"ids {row} are decoded as {together!r} in a batch, as {single!r} alone")


@PROPERTIES(
    "pad and mask have ids of their own",
    "Padding cannot be distinguished from an end of text, or a mask from an unknown word.",
)
def special_ids(subject: Subject) -> str:
    roles: dict[int, list[str]] = {}
    for role, number in subject.specials.items():
        roles.setdefault(number, []).append(role)
    shared = [f"{', '.join(names)} share {number}" for number, names in roles.items() if len(names) > 1]
    for number, names in roles.items():
        if len(names) > 1 and {"pad", "mask"} & set(names):
            raise Violation(f"{' and '.join(f'{name}_id' for name in names)} are all {number}")
    return "; ".join(shared)


@PROPERTIES(
    "decode returns the text that was encoded",
    "Generated text is not what the model produced. A tokenizer that drops something on purpose (case, spaces) "
    "declares lossless = False; encoding and decoding its decoded text must then change nothing.",
)
def round_trip(subject: Subject) -> str:
    tokenizer, unk = subject.ready, subject.specials["unk"]

    def changed(text: str) -> bool:
        ids = tokenizer.encode(text)
        if unk in ids:  # no tokenizer can restore what the unknown token replaced
            return False
        back = tokenizer.decode(ids)
        return back != text if tokenizer.lossless else tokenizer.decode(tokenizer.encode(back)) != back

    for text in subject.texts:
        if changed(text):
            small = shrunk(text, changed)
            ids = tokenizer.encode(small)
            back = tokenizer.decode(ids)
            shown = f"{small!r} is encoded as {ids}, which is decoded as {back!r}"
            if not tokenizer.lossless:
                again = tokenizer.encode(back)
                shown += f"; that is encoded as {again}, which is decoded as {tokenizer.decode(again)!r}"
            raise Violation(shown)
    if tokenizer.lossless:
        return "nothing lost"
    exact = sum(tokenizer.decode(tokenizer.encode(text)) == text for text in subject.texts)
    return f"{exact} of {len(subject.texts)} texts are restored exactly"


def _timed(tokenizer: Tokenizer, text: str) -> tuple[list[int], float]:
    """Return the ids of a text, and the CPU seconds that it took to encode it."""
    start = time.process_time()
    ids = tokenizer.encode(text)
    return ids, time.process_time() - start


@PROPERTIES(
    "encoding time is proportional to the length of the text",
    "Encoding a book, or a file without spaces, never ends.",
)
def long_text(subject: Subject) -> str:
    tokenizer = subject.ready
    units = {"of words": "the lazy dog sleeps ", "without a space": "abcdefgh", "of one letter": "a", "of spaces": " "}
    speed = 0.0
    for name, unit in units.items():
        shorter, before = "", 0.0
        for length in (4_000, 20_000, 100_000):
            text = unit * (length // len(unit))
            row, spent = _timed(tokenizer, text)
            if before and spent > max(0.1, 3 * 5 * before):
                # A busy machine, or a page fault, can make one call slow: the fastest of three counts.
                before, spent = (min(_timed(tokenizer, again)[1] for _ in range(3)) for again in (shorter, text))
            if before and spent > max(0.1, 3 * 5 * before):
                raise Violation(
                    f"{length // 5:,} characters {name} took {before:.2g} s, five times as many took {spent:.2g} s: "
                    f"{spent / before:.0f} times as long"
                )
            if name == "of words":
                speed = length / max(spent, 1e-9)
            most = len(text) // len(unit) * len(tokenizer.encode(unit))
            if name == "of words" and len(row) < 0.5 * most:
                copies = len(text) // len(unit)
                raise Violation(f"{unit!r} times {copies} has {len(row)} ids, expected about {most}; is it truncated?")
            shorter, before = text, spent
            if spent > 0.3:
                break
    return f"{speed / 1e6:.2g} million characters a second"


@PROPERTIES(
    "special ids never come from text",
    "A user who types '<|endoftext|>' ends the text there, or puts padding in the middle of it.",
)
def specials_not_from_text(subject: Subject) -> str:
    tokenizer = subject.ready
    own = _strings([json.loads(tokenizer.to_state()), vars(tokenizer)])
    # Its own strings, first those that look like special tokens: with the name of a role, or a bracket.
    ordered = sorted(own, key=lambda text: (not any(role in text.lower() for role in (*ROLES, "<", "[")), text))
    texts = [*NAMES, *ordered[:2000]]
    texts += [f"a{text}b {text}{text} \n{text}" for text in texts]
    check_specials(tokenizer, texts, subject.specials)
    return f"{len(texts):,} texts tried"


def _strings(value: Any, depth: int = 0) -> set[str]:
    """Return the strings in nested data that are short enough to spell a special token."""
    if isinstance(value, str):
        return {value} if len(value) <= 40 else set()
    if isinstance(value, dict):
        value = [*value, *value.values()]
    found: set[str] = set()
    for item in value if isinstance(value, (list, tuple, set, frozenset)) and depth < 7 else ():
        found |= _strings(item, depth + 1)
    return found


@PROPERTIES(
    "decode leaves special ids out",
    "Answers end in '</s><pad><pad>', and BLEU is measured on that.",
)
def specials_not_decoded(subject: Subject) -> None:
    tokenizer, specials = subject.ready, subject.specials
    ids = tokenizer.encode("the fox jumps")
    expected = tokenizer.decode(ids)
    for role, number in specials.items():
        for row, right in (([number], ""), ([number, *ids], expected), ([*ids, number], expected)):
            found = tokenizer.decode(row)
            if found != right:
                raise Violation(f"ids {row} are decoded as {found!r}, expected {right!r}: {number} is {role}_id")


@PROPERTIES(
    "any ids can be decoded to valid text",
    "Generation crashes as soon as an untrained model produces half a character.",
)
def decodes_anything(subject: Subject) -> None:
    tokenizer, rng = subject.ready, random.Random(subject.seed)
    size = tokenizer.vocab_size
    singles = [[number] for number in (range(size) if size <= 2000 else rng.sample(range(size), 2000))]
    for row in [*singles, *(rng.choices(range(size), k=rng.randint(2, 12)) for _ in range(100))]:
        try:
            tokenizer.decode(row).encode()
        except Exception as error:
            raise Violation(f"decode({row}) {raised(error)}") from error
