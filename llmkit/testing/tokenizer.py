"""What every tokenizer owes its users, however it cuts text into pieces."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.contracts import Tokenizer
from llmkit.testing.report import NotApplicable, Properties, Violation

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")
NAMES = (
    *(f"<{name}>" for name in (*ROLES, "s", "/s", "cls", "|endoftext|", "|pad|", "|im_start|", "|begin_of_text|")),
    *(f"[{name}]" for name in ("PAD", "CLS", "SEP", "UNK", "MASK", "BOS", "EOS")),
    *("PAD", "EOS", "pad", "eos"),
)
"""How special tokens are spelled here and there."""

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "the dog (a lazy one) sleeps; the fox jumps again! UPPER Lower camelCase snake_case",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Où est l'hôtel ? À côté, señor ; İstanbul, żółw, Ångström",
    "我爱学习编程。狐狸跳过了懒狗，你好！",
    "私は本を読みます。カタカナとひらがな。",
    "Hello 你好 world 世界, mixed 文字 in one line",
    "👋 🇩🇪 👩\u200d👧 👍🏽",
    "3.14159 and 1,000,000 on 2024-12-31 at 23:59, ½ of 10²",
    "f(x) = [a, b] * {c} / <d> & |e| \\ ~ `g` # @ $ % \"quoted\" 'single' “curly” - – — …",
    "  two spaces before, two after  ",
    "a tab\there,\ttwo\t\tthere",
    "one line\nanother\r\nand\n\n\na gap\n",
    "e\u0301 is not é, ﬁ is not fi, a\u00a0b and a\u3000b are not a b",
    "the ▁ that pieces mark their spaces with",
    " ",
    "\n",
    "",
    *NAMES,
    " ".join(NAMES),
]
"""What a tokenizer is trained on here: accents, Chinese, Japanese, emoji, digits, white space, names of specials."""

UNSEEN = ["ქართული", "ሰላም", "𐍈", "\U0010ffff", "ab ქართ cd"]
"""Scripts that are not in the corpus."""

ODD = ["\x00", "\x7f\x85", "\ufeff", "\ufffd\ufffe\uffff", "\u2028", "\u2581▁ a", "\ud83d", "a\udc00b"]
"""Text of bad files: control characters, byte order marks, lone surrogates (which no UTF-8 text can hold)."""


@dataclass(frozen=True)
class Subject:
    """A tokenizer under examination.

    Attributes:
        factory: builds it.
        seed: of the random texts.
    """

    factory: functools.partial[Any]
    seed: int = 0

    def fresh(self, texts: Iterable[str] = CORPUS * 3) -> Tokenizer:
        """Return a new tokenizer, trained on the texts unless it is trained already."""
        tokenizer: Tokenizer = self.factory()
        if not tokenizer.trained:
            tokenizer.train(iter(texts))
        return tokenizer

    @functools.cached_property
    def ready(self) -> Tokenizer:
        """A trained tokenizer that all properties may use, as long as they do not change it."""
        return self.fresh()

    @functools.cached_property
    def texts(self) -> list[str]:
        """Texts of known characters: each character alone, the corpus, random ones."""
        characters = sorted(set("".join(CORPUS)))
        rng = random.Random(self.seed)
        mixed = ["".join(rng.choices(characters, k=rng.randint(2, 40))) for _ in range(60)]
        words = [word for text in CORPUS for word in text.split(" ")]
        spoken = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(40)]
        return [*characters, *CORPUS, *mixed, *spoken]

    @property
    def specials(self) -> dict[str, int]:
        """The id of each role. Raises Violation for one that is missing or is no int."""
        found = {role: getattr(self.ready, f"{role}_id", None) for role in ROLES}
        for role, number in found.items():
            if type(number) is not int:
                raise Violation(f"{role}_id is {number!r}, expected an int")
        return found  # type: ignore[return-value]


def subject(factory: functools.partial[Any], *, seed: int = 0) -> Subject:
    """Return what is examined."""
    return Subject(factory, seed)


PROPERTIES: Properties[Subject] = Properties()


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of the texts. Raises Violation unless they are one list of ints for each text."""
    rows = tokenizer.encode_batch(list(texts))
    if not isinstance(rows, list) or len(rows) != len(texts):
        size = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise Violation(f"encode_batch of {len(texts)} texts gave {size}, expected a list of {len(texts)} lists")
    for text, row in zip(texts, rows, strict=True):
        wrong = [i for i in row if type(i) is not int] if isinstance(row, list) else [row]
        if wrong:
            kind = type(wrong[0])
            raise Violation(f"encode of {text!r} holds a {kind.__module__}.{kind.__name__}, expected a list of int")
    return rows


def shrunk(text: str, fails: Callable[[str], bool]) -> str:
    """Return a text as short as plain cutting makes it that still fails."""
    size = len(text) // 2
    while size:
        for start in range(len(text) - size + 1):
            shorter = text[:start] + text[start + size :]
            if fails(shorter):
                text = shorter
                break
        else:
            size //= 2
        size = min(size, len(text))
    return text


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
            f"'trained' is {before!r} at first and {tokenizer.trained!r} after train; expected a bool, True"
        )
    if type(size) is not int or size < 1:
        raise Violation(f"vocab_size is {size!r}, expected a positive int")
    text = tokenizer.to_state()
    if not isinstance(text, str):
        raise Violation(f"to_state gives {type(text).__name__}, expected a JSON string")
    try:
        json.loads(text)
    except ValueError as error:
        raise Violation(f"to_state gives {text[:60]!r}, which is no JSON: {error}") from error
    return f"{size:,} ids, {'given' if before else 'learned'}"


@PROPERTIES(
    "ids are ints below vocab_size",
    "The embedding is indexed outside of its table: a crash, on a GPU one that does not say why.",
    essential=True,
)
def ids_in_range(subject: Subject) -> None:
    size = subject.ready.vocab_size
    _check_range(subject.ready, subject.texts)
    for role, number in subject.specials.items():
        if not 0 <= number < size:
            raise Violation(f"vocab_size {size}, and {role}_id is {number}")


def _check_range(tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = encoded(tokenizer, texts)
    size = tokenizer.vocab_size
    for text, row in zip(texts, rows, strict=True):
        if row and not 0 <= min(row) <= max(row) < size:
            raise Violation(f"vocab_size {size}, and {text!r} is encoded as {row}")


@PROPERTIES(
    "any text can be encoded; what is unknown becomes the unknown token or bytes",
    "One odd character in a file stops a long preparation, or vanishes without a trace.",
    essential=True,
)
def any_text(subject: Subject) -> str:
    tokenizer, unk = subject.ready, subject.specials["unk"]
    if tokenizer.encode("") != [] or tokenizer.decode([]) != "":
        raise Violation(
            f"'' is encoded as {tokenizer.encode('')}, [] decoded as {tokenizer.decode([])!r}; expected [], ''"
        )
    for text in ODD + UNSEEN:
        try:
            _check_range(tokenizer, [text])
            tokenizer.decode(tokenizer.encode(text))
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{text!r} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    for text in UNSEEN[:-1]:
        if not tokenizer.encode(text):
            raise Violation(f"{text!r} is encoded as [], expected unk_id ({unk}) or bytes")
    return "unknown: unk_id" if unk in tokenizer.encode(UNSEEN[0]) else "nothing is unknown"


@PROPERTIES(
    "a text is encoded as it is alone, in whatever batch and order",
    "The same text has other ids in training than when it is used.",
    essential=True,
)
def batches(subject: Subject) -> None:
    tokenizer = subject.ready
    if tokenizer.encode_batch([]) != [] or tokenizer.decode_batch([]) != []:
        raise Violation("an empty batch does not give an empty list")
    texts = [*subject.texts, *UNSEEN, subject.texts[0]]
    alone = [encoded(tokenizer, [text])[0] for text in texts]
    _same_rows(texts, encoded(tokenizer, texts), alone, "in a batch", "alone")
    _same_rows(texts, encoded(tokenizer, texts[::-1])[::-1], alone, "in a batch in reverse order", "alone")
    for text, row in zip(texts, alone, strict=True):
        if tokenizer.encode(text) != row:
            raise Violation(f"{text!r}: encode gives {tokenizer.encode(text)}, encode_batch {row}")
    decoded, one_by_one = tokenizer.decode_batch(alone), [tokenizer.decode(row) for row in alone]
    for row, together, single in zip(alone, decoded, one_by_one, strict=True):
        if together != single:
            raise Violation(f"ids {row} are decoded as {together!r} in a batch, as {single!r} alone")


def _same_rows(texts: list[str], rows: list[list[int]], expected: list[list[int]], how: str, other: str) -> None:
    for text, row, right in sorted(zip(texts, rows, expected, strict=True), key=lambda entry: len(entry[0])):
        if row != right:
            raise Violation(f"{text!r} is encoded as {row!r:.100} {how}, as {right!r:.100} {other}")


@PROPERTIES(
    "pad and mask are ids of their own",
    "Padding that is also an end of text, or a mask that is also an unknown word, cannot be told apart.",
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
    "decode gives back what was encoded",
    "Generated text is not what the model has written. A tokenizer that loses something on purpose (case, spaces) says "
    "so by lossless = False; what it decodes then has to come back, encoded and decoded again.",
)
def round_trip(subject: Subject) -> str:
    tokenizer, unk = subject.ready, subject.specials["unk"]

    def changed(text: str) -> bool:
        ids = tokenizer.encode(text)
        if unk in ids:  # what it stands for is lost, whatever the tokenizer
            return False
        back = tokenizer.decode(ids)
        return back != text if tokenizer.lossless else tokenizer.decode(tokenizer.encode(back)) != back

    for text in subject.texts:
        if changed(text):
            small = shrunk(text, changed)
            ids = tokenizer.encode(small)
            back = tokenizer.decode(ids)
            told = f"{small!r} is encoded as {ids}, which is decoded as {back!r}"
            if not tokenizer.lossless:
                again = tokenizer.encode(back)
                told += f"; that is encoded as {again}, which is decoded as {tokenizer.decode(again)!r}"
            raise Violation(told)
    if tokenizer.lossless:
        return "nothing lost"
    exact = sum(tokenizer.decode(tokenizer.encode(text)) == text for text in subject.texts)
    return f"{exact} of {len(subject.texts)} texts come back exactly"


@PROPERTIES(
    "a long text takes time in proportion",
    "A book, or a file without spaces, is never done.",
)
def long_text(subject: Subject) -> str:
    tokenizer = subject.ready
    units = {"of words": "the lazy dog sleeps ", "without a space": "abcdefgh", "of one letter": "a", "of spaces": " "}
    speed = 0.0
    for name, unit in units.items():
        before = 0.0
        for length in (4_000, 20_000, 100_000):
            text = unit * (length // len(unit))
            start = time.process_time()
            row = tokenizer.encode(text)
            spent = time.process_time() - start
            if before and spent > max(0.1, 3 * 5 * before):
                raise Violation(
                    f"{length // 5:,} characters {name} took {before:.2g} s, five times as many {spent:.2g} s: "
                    f"{spent / before:.0f} times as long"
                )
            if name == "of words":
                speed = length / max(spent, 1e-9)
            most = len(text) // len(unit) * len(tokenizer.encode(unit))
            if name == "of words" and len(row) < 0.5 * most:
                raise Violation(f"{unit!r} times {len(text) // len(unit)} has {len(row)} ids, not {most}; is it cut?")
            before = spent
            if spent > 0.3:
                break
    return f"{speed / 1e6:.2g} million characters a second"


@PROPERTIES(
    "special ids never come from text",
    "Whoever writes '<|endoftext|>' into a prompt or a page ends the text there; padding stands in the middle of it.",
)
def specials_not_from_text(subject: Subject) -> str:
    tokenizer = subject.ready
    own = _strings([json.loads(tokenizer.to_state()), vars(tokenizer)])
    # Of its own strings those first that look like names of roles.
    ordered = sorted(own, key=lambda text: (not any(role in text.lower() for role in (*ROLES, "<", "[")), text))
    texts = [*NAMES, *ordered[:2000]]
    texts += [f"a{text}b {text}{text} \n{text}" for text in texts]
    _check_specials(tokenizer, texts, subject.specials)
    return f"{len(texts):,} texts tried"


def _check_specials(tokenizer: Tokenizer, texts: list[str], specials: dict[str, int]) -> None:
    forbidden = {number: role for role, number in specials.items() if number != specials["unk"]}
    for text, row in zip(texts, encoded(tokenizer, texts), strict=True):
        if forbidden.keys() & set(row):
            small = shrunk(text, lambda part: bool(forbidden.keys() & set(tokenizer.encode(part))))
            row = tokenizer.encode(small)
            found = next(number for number in row if number in forbidden)
            raise Violation(f"{small!r} is encoded as {row}, and {found} is {forbidden[found]}_id")


def _strings(value: Any, depth: int = 0) -> set[str]:
    """Return the strings, no longer than a name, in nested data."""
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
    "any ids can be decoded to text that can be written",
    "Generation stops with an error as soon as an untrained model writes half a character.",
)
def decodes_anything(subject: Subject) -> None:
    tokenizer, rng = subject.ready, random.Random(subject.seed)
    size = tokenizer.vocab_size
    singles = [[number] for number in (range(size) if size <= 2000 else rng.sample(range(size), 2000))]
    for row in [*singles, *(rng.choices(range(size), k=rng.randint(2, 12)) for _ in range(100))]:
        try:
            tokenizer.decode(row).encode()
        except Exception as error:
            raise Violation(f"decode({row}) raised {type(error).__name__}: {error}") from error


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
    _same_rows(texts, encoded(restored, texts), rows, "after to_state and from_state", "before")
    for row in rows:
        if tokenizer.decode(row) != restored.decode(row):
            raise Violation(
                f"ids {row} are decoded as {tokenizer.decode(row)!r}, but as {restored.decode(row)!r} after to_state "
                "and from_state"
            )
    _same_states(restored.to_state(), text, "to_state after from_state differs from the state that was read")
    return f"{len(text):,} characters"


def _same_states(found: str, expected: str, told: str) -> None:
    if json.loads(found) != json.loads(expected):
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
        raise Violation(f"{told}: from character {at} on {found[at : at + 60]!r}, not {expected[at : at + 60]!r}")


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
        _same_rows(texts, encoded(other, texts), rows, f"after {name}", "before")
        _check_specials(other, list(NAMES), subject.specials)  # settings of wrapped libraries get lost


@PROPERTIES(
    "training twice on the same texts gives the same tokenizer",
    "Runs cannot be repeated, and processes of one run disagree.",
)
def training_repeats(subject: Subject) -> None:
    if subject.factory().trained:
        raise NotApplicable("it comes trained")
    _same_states(subject.fresh().to_state(), subject.fresh().to_state(), "a second training gives another state")


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
    _same_states(tokenizer.to_state(), before, "the state is another one after texts were encoded")
    if tokenizer.vocab_size != size:
        raise Violation(f"vocab_size was {size}, and is {tokenizer.vocab_size} after texts were encoded")
    _same_rows(subject.texts, encoded(tokenizer, subject.texts), first, "after other texts", "before them")
