"""What the tokenizers share: special ids, valid text, states, and the wrapper around Hugging Face ``tokenizers``.

Special tokens are out of reach of plain text: inside a model they have names that no piece of text can equal (see
``hidden``), and matching of added tokens is off for them. A lone surrogate, which no UTF-8 text can hold, is read as
U+FFFD in every tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from llmkit.contracts import Tokenizer
from llmkit.errors import UserError

from .byte_pairs import Encoder

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")
NO_TEXT = "no text to train the tokenizer on"
MAX_UNUSED_IDS = 2**16
"""Ids below the largest one that may be without a token."""


def hidden(name: str) -> str:
    """Return the name of a special token inside a model. Pieces of text hold no space, so none can equal it."""
    return f"{name} \uffff"


SPECIALS = [hidden(f"<{role}>") for role in ROLES]


def valid(text: str) -> str:
    """Return text that is encodable as UTF-8: surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def checked(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts that are not empty. Raises UserError at the end when all were empty."""
    empty = True
    for text in texts:
        if text:
            empty = False
            yield valid(text)
    if empty:
        raise UserError(NO_TEXT)


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turn the errors of ``tokenizers``, a bare Exception or a panic (which is no Exception), into a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise UserError(f"{what}: {line(error)}") from error
        raise


def line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def parse(data: Any, what: str) -> HFTokenizer:
    """Return the tokenizer of a parsed ``tokenizer.json``, without its padding and truncation."""
    with rust_errors(what):
        hf = HFTokenizer.from_str(json.dumps(data))
        check_ids(hf, what)
        hf.no_padding()
        hf.no_truncation()
        hf.decode(hf.encode("a \U0010fffd").ids)  # some broken models load, and fail at their first text
    return hf


def check_ids(hf: HFTokenizer, what: str) -> None:
    """Raise UserError when ids are far apart: ``tokenizers`` walks through all numbers between them to write itself."""
    ids = hf.get_vocab().values()
    largest = max(ids, default=0)
    if largest > len(ids) + MAX_UNUSED_IDS:
        raise UserError(f"{what}: its largest id is {largest:,}, and it has only {len(ids):,} tokens")


def shown(data: dict[str, Any]) -> dict[str, Any]:
    """Return a ``tokenizer.json`` whose special tokens have their names without what hides them.

    A name that a piece of text has gets other brackets. In models that look up whole pieces it stays hidden, since a
    text that spells it would be that token.
    """
    model = data["model"]
    if model["type"] in ("WordLevel", "Unigram"):
        return data
    names = {token["content"] for token in data["added_tokens"] if token["special"]}
    pieces = model["vocab"].keys() - names

    def plain(name: str) -> str:
        found = name.removesuffix(hidden(""))
        return found if found not in pieces else f"<|{found.strip('<>[]|')}|>"

    model["vocab"] = {plain(piece) if piece in names else piece: number for piece, number in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = plain(model["unk_token"])
    for token in data["added_tokens"]:
        token["content"] = plain(token["content"]) if token["content"] in names else token["content"]
    return data


class Stateful(Tokenizer):
    """A tokenizer whose state is a JSON object that names its class."""

    def _pack(self, **learned: Any) -> str:
        return json.dumps({"tokenizer": type(self).__name__, **learned})

    def _unpack(self, state: str) -> dict[str, Any]:
        try:
            data = json.loads(state)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"tokenizer state is not valid JSON: {line(error)}") from error
        name = data.get("tokenizer") if isinstance(data, dict) else None
        if name != type(self).__name__:
            raise UserError(f"tokenizer state is of {str(name)[:50]!r}, expected {type(self).__name__!r}")
        return data  # type: ignore[no-any-return]

    def _broken(self) -> UserError:
        return UserError(f"tokenizer state of {type(self).__name__} is incomplete or contradicts itself")

    def _untrained(self) -> UserError:
        return UserError(f"tokenizer {type(self).__name__} is not trained yet: call train or from_state first")


class Own(Stateful):
    """A tokenizer of this module's own vocabulary, which begins with the special tokens."""

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(len(ROLES))

    def _check_size(self, vocab_size: int, minimum: int, what: str) -> None:
        if vocab_size < minimum:
            raise UserError(
                f"tokenizer {type(self).__name__}: vocab_size {vocab_size} is too small, the minimum is {minimum} "
                f"({len(ROLES)} special tokens and {what})"
            )


class HuggingFace(Stateful):
    """A tokenizer that wraps one of ``tokenizers``; it pickles because that one does."""

    _hf: HFTokenizer | None = None
    _encoder: Encoder | None = None

    def _ready(self) -> HFTokenizer:
        if self._hf is None:
            raise self._untrained()
        return self._hf

    @property
    def trained(self) -> bool:
        return self._hf is not None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_encoder"}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        hf = self._ready()
        hf.encode_special_tokens = True  # set here, because neither its JSON nor its pickle keeps it
        if self._encoder is None or self._encoder.hf is not hf:
            self._encoder = Encoder(hf)
        return self._encoder.encode([valid(text) for text in texts])

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return self._ready().decode_batch(ids, skip_special_tokens=True)

    def published(self) -> dict[str, Any]:
        """Return this tokenizer as the content of a ``tokenizer.json``: special tokens have names that people know."""
        return shown(json.loads(self._ready().to_str()))

    def to_state(self) -> str:
        return self._pack(model=json.loads(self._ready().to_str()))

    def from_state(self, state: str) -> None:
        self._hf = self._restore(self._unpack(state))

    def _restore(self, data: dict[str, Any]) -> HFTokenizer:
        return parse(data.get("model"), f"tokenizer state of {type(self).__name__}")


def byte_level(model: models.BPE) -> HFTokenizer:
    hf = HFTokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return hf
