"""Marian's files: a SentencePiece model of the source language, and a vocabulary of both."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from llmkit.errors import UserError

from .base import hidden, rust_errors

UNIGRAM = 1
"""The kind of model that is read; the others are BPE, words and characters."""
NORMAL, USER_DEFINED = 1, 4
"""Kinds of pieces that stand for text."""


def source_tokenizer(folder: Path, what: str) -> HFTokenizer:
    """Return a tokenizer that encodes the source language and decodes both.

    Kudo and Richardson 2018, arXiv:1808.06226. vocab.json has the ids of both languages; a longer piece that only the
    target has gets a name that no text can equal, which the decoder takes off again. A code such as ``>>fra<<``, by
    which models of several target languages know which one to write, is one token.

    Args:
        folder: has source.spm and vocab.json.
        what: what messages call it.

    Raises UserError for damaged files, and for models that are not of the kind unigram.
    """
    try:
        scores, charsmap = _model((folder / "source.spm").read_bytes())
    except (ValueError, TypeError, AttributeError, LookupError, struct.error) as error:  # fields of other kinds
        raise UserError(f"{what}: source.spm is not a SentencePiece model of the kind unigram ({error})") from error
    ids = _ids(folder / "vocab.json", what)
    least = min(scores.values(), default=0.0)
    codes = [piece for piece in ids if piece.startswith(">>") and piece.endswith("<<")]
    # A character that the source does not know is looked up as it stands.
    shown = {*scores, *codes, "<unk>", "</s>", "<pad>", *(piece for piece in ids if len(piece) == 1)}
    vocab = [(piece if piece in shown else hidden(piece), scores.get(piece, least)) for piece in ids]
    with rust_errors(what):
        hf = HFTokenizer(models.Unigram(vocab, ids["<unk>"], False))
        spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
        hf.normalizer = normalizers.Sequence([*([normalizers.Precompiled(charsmap)] if charsmap else []), *spaces])
        hf.pre_tokenizer = pre_tokenizers.Metaspace()
        hf.decoder = decoders.Sequence([decoders.Replace(hidden(""), ""), decoders.Metaspace()])
        hf.add_tokens([AddedToken(code, rstrip=True, normalized=False) for code in codes])
        hf.add_special_tokens(["<unk>", "</s>", "<pad>"])
        hf.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    return hf


def _ids(file: Path, what: str) -> dict[str, int]:
    """Return the pieces of a vocab.json in the order of their ids. Raises UserError unless these are 0, 1, 2, ..."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: vocab.json is not JSON") from error
    numbers = list(found.values()) if isinstance(found, dict) else []
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise UserError(f"{what}: vocab.json should give each piece a number, from 0 without gaps")
    if missing := [name for name in ("<unk>", "</s>", "<pad>") if name not in found]:
        raise UserError(f"{what}: vocab.json has no {missing[0]}")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _model(data: bytes) -> tuple[dict[str, float], bytes]:
    """Return the score of each piece, and the compiled rules by which texts are normalised.

    Raises an error of many kinds for anything else than a unigram model.
    """
    scores: dict[str, float] = {}
    charsmap, kind = b"", UNIGRAM
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            if piece.get(3, NORMAL) in (NORMAL, USER_DEFINED):
                scores[piece[1].decode()] = struct.unpack("<f", piece.get(2, bytes(4)))[0]
        elif number == 2:
            kind = dict(_fields(value)).get(3, UNIGRAM)
        elif number == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if kind != UNIGRAM or not scores:
        raise ValueError(f"its kind is {kind}, and it has {len(scores)} pieces")
    return scores, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value, an int or bytes, of each field of a message in the format of Protocol Buffers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("it has a number of more than 64 bits")

    while at < len(data):
        key = varint()
        sizes = {1: 8, 5: 4}
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2 or key & 7 in sizes:
            size = sizes.get(key & 7) or varint()
            if at + size > len(data):
                raise ValueError("it is cut short")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError("it has a field of an unknown kind")
