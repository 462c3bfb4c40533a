"""A tokenizer under test, the texts it is tried with, and comparisons that several properties share."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.contracts import Tokenizer
from llmkit.testing.report import Violation

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")
NAMES = (
    *(f"<{name}>" for name in (*ROLES, "s", "/s", "cls", "|endoftext|", "|pad|", "|im_start|", "|begin_of_text|")),
    *(f"[{name}]" for name in ("PAD", "CLS", "SEP", "UNK", "MASK", "BOS", "EOS")),
    *("PAD", "EOS", "pad", "eos"),
)
"""Common spellings of special tokens."""

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
"""Training texts: accents, Chinese, Japanese, emoji, digits, white space, spellings of special tokens."""

UNSEEN = ["ქართული", "ሰላም", "𐍈", "\U0010ffff", "ab ქართ cd"]
"""Scripts that are not in the corpus."""

ODD = ["\x00", "\x7f\x85", "\ufeff", "\ufffd\ufffe\uffff", "\u2028", "\u2581▁ a", "\ud83d", "a\udc00b"]
"""Text from damaged files: control characters, byte order marks, lone surrogates (which UTF-8 cannot encode)."""


@dataclass(frozen=True)
class Subject:
    """A tokenizer under test.

    Attributes:
        factory: builds it.
        seed: of the random texts.
    """

    factory: functools.partial[Any]
    seed: int = 0

    def fresh(self, texts: Iterable[str] = CORPUS * 3) -> Tokenizer:
        """Return a new tokenizer, trained on the texts unless it comes trained."""
        tokenizer: Tokenizer = self.factory()
        if not tokenizer.trained:
            tokenizer.train(iter(texts))
        return tokenizer

    @functools.cached_property
    def ready(self) -> Tokenizer:
        """A trained tokenizer shared by all properties, which must not change it."""
        return self.fresh()

    @functools.cached_property
    def texts(self) -> list[str]:
        """Texts of known characters: each character alone, the corpus, random strings and sentences."""
        characters = sorted(set("".join(CORPUS)))
        rng = random.Random(self.seed)
        mixed = ["".join(rng.choices(characters, k=rng.randint(2, 40))) for _ in range(60)]
        words = [word for text in CORPUS for word in text.split(" ")]
        spoken = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(40)]
        return [*characters, *CORPUS, *mixed, *spoken]

    @property
    def specials(self) -> dict[str, int]:
        """The id of each role. Raises Violation for one that is missing or not an int."""
        found = {role: getattr(self.ready, f"{role}_id", None) for role in ROLES}
        for role, number in found.items():
            if type(number) is not int:
                raise Violation(f"{role}_id is {number!r}, expected an int")
        return found  # type: ignore[return-value]


def subject(factory: functools.partial[Any], *, seed: int = 0) -> Subject:
    """Return the subject."""
    return Subject(factory, seed)


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of the texts. Raises Violation unless they are one list of ints for each text."""
    rows = tokenizer.encode_batch(list(texts))
    if not isinstance(rows, list) or len(rows) != len(texts):
        size = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise Violation(f"encode_batch of {len(texts)} texts returned {size}, expected a list of {len(texts)} lists")
    for text, row in zip(texts, rows, strict=True):
        wrong = [i for i in row if type(i) is not int] if isinstance(row, list) else [row]
        if wrong:
            kind = type(wrong[0])
            raise Violation(f"encode of {text!r} contains a {kind.__module__}.{kind.__name__}, expected a list of int")
    return rows


def shrunk(text: str, fails: Callable[[str], bool]) -> str:
    """Return a shorter text that still fails, found by deleting pieces until no deletion works."""
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


def check_range(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Raise Violation for an id outside of the vocabulary."""
    rows = encoded(tokenizer, texts)
    size = tokenizer.vocab_size
    for text, row in zip(texts, rows, strict=True):
        if row and not 0 <= min(row) <= max(row) < size:
            raise Violation(f"vocab_size is {size}, but {text!r} is encoded as {row}")


def same_rows(texts: list[str], rows: list[list[int]], expected: list[list[int]], how: str, other: str) -> None:
    """Raise Violation, for the shortest text, unless texts are encoded as expected."""
    for text, row, right in sorted(zip(texts, rows, expected, strict=True), key=lambda entry: len(entry[0])):
        if row != right:
            raise Violation(f"{text!r} is encoded as {row!r:.100} {how}, as {right!r:.100} {other}")


def check_specials(tokenizer: Tokenizer, texts: list[str], specials: dict[str, int]) -> None:
    """Raise Violation when a special id other than unk comes from text."""
    forbidden = {number: role for role, number in specials.items() if number != specials["unk"]}
    for text, row in zip(texts, encoded(tokenizer, texts), strict=True):
        if forbidden.keys() & set(row):
            small = shrunk(text, lambda part: bool(forbidden.keys() & set(tokenizer.encode(part))))
            row = tokenizer.encode(small)
            found = next(number for number in row if number in forbidden)
            raise Violation(f"{small!r} is encoded as {row}, and {found} is {forbidden[found]}_id")


def same_states(found: str, expected: str, message: str) -> None:
    """Raise Violation unless two JSON states are equal."""
    if json.loads(found) != json.loads(expected):
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
        raise Violation(f"{message}: from character {at} on {found[at : at + 60]!r}, not {expected[at : at + 60]!r}")
