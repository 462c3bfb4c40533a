"""Tokenizers whose pieces are characters and bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from .base import ROLES, SPECIALS, Own, checked, shown, valid


class Char(Own):
    """One token per Unicode character; nothing is normalised.

    Source: as in Sutskever et al. 2011, "Generating Text with Recurrent Neural Networks". Ids follow the code points.

    Args:
        vocab_size: keep only the most frequent characters, so that there are at most this many ids; the others become
            the unknown token. None keeps every character seen in training.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        if vocab_size is not None:
            self._check_size(vocab_size, len(ROLES) + 1, "one character")
        self._limit = vocab_size
        self._characters = ""
        self._ids: dict[str, int] = {}

    @property
    def vocab_size(self) -> int:
        if not self.trained:
            raise self._untrained()
        return len(ROLES) + len(self._characters)

    @property
    def trained(self) -> bool:
        return bool(self._characters)

    def train(self, texts: Iterator[str]) -> None:
        counts: Counter[str] = Counter()
        for text in checked(texts):
            counts.update(text)
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        self._set("".join(sorted(ranked if self._limit is None else ranked[: self._limit - len(ROLES)])))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not self.trained:
            raise self._untrained()
        get, unk = self._ids.get, self.unk_id
        return [[get(character, unk) for character in valid(text)] for text in texts]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        first, size, characters = len(ROLES), self.vocab_size, self._characters
        return ["".join([characters[i - first] for i in row if first <= i < size]) for row in ids]

    def to_state(self) -> str:
        if not self.trained:
            raise self._untrained()
        return self._pack(characters=self._characters)

    def from_state(self, state: str) -> None:
        characters = self._unpack(state).get("characters")
        if not isinstance(characters, str) or not characters or characters != "".join(sorted(set(valid(characters)))):
            raise self._broken()
        self._set(characters)

    def published(self) -> dict[str, Any]:
        """Return this tokenizer as the content of a ``tokenizer.json``."""
        vocab = {piece: number for number, piece in enumerate([*SPECIALS, *self._characters])}
        hf = HFTokenizer(models.WordLevel(vocab, unk_token=SPECIALS[self.unk_id]))
        hf.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        hf.decoder = decoders.Fuse()
        return _with_specials(hf)

    def _set(self, characters: str) -> None:
        self._characters = characters
        self._ids = {character: i for i, character in enumerate(characters, len(ROLES))}


class Byte(Own):
    """One token per byte of the UTF-8 text; needs no training.

    Source: RFC 3629 (UTF-8); as in ByT5, Xue et al. 2022, arXiv:2105.13626. Byte ``b`` has the id ``6 + b``.
    """

    @property
    def vocab_size(self) -> int:
        return len(ROLES) + 256

    @property
    def trained(self) -> bool:
        return True

    def train(self, texts: Iterator[str]) -> None:
        """Do nothing, not even read the texts: the 256 bytes are the vocabulary."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        first = len(ROLES)
        return [[byte + first for byte in valid(text).encode()] for text in texts]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        first, size = len(ROLES), self.vocab_size
        return [bytes([i - first for i in row if first <= i < size]).decode("utf-8", "replace") for row in ids]

    def published(self) -> dict[str, Any]:
        """Return this tokenizer as the content of a ``tokenizer.json``."""
        vocab = {piece: number for number, piece in enumerate([*SPECIALS, *_bytes()])}
        hf = HFTokenizer(models.BPE(vocab, []))
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf.decoder = decoders.ByteLevel()
        return _with_specials(hf)

    def to_state(self) -> str:
        return self._pack()

    def from_state(self, state: str) -> None:
        self._unpack(state)


def _with_specials(hf: HFTokenizer) -> dict[str, Any]:
    hf.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    return shown(json.loads(hf.to_str()))


def _bytes() -> list[str]:
    """Return the character that byte-level models write for each byte, in order (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
