"""For heads that label words: cutting text into words, encoding word by word, one state for each word."""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

import torch
from torch import Tensor

from llmkit.contracts import Tokenizer

Span = tuple[int, int]
"""Where a word begins in its text, and where it ends."""

_UNSPACED = (  # scripts without spaces between words, with their punctuation: Thai to Khmer, kana, Han, fullwidth
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3001-\u30ff\u3100-\u312f\u3190-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_HANGUL = "\u1100-\u11ff\uac00-\ud7af"
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"(?:[^\W_{_UNSPACED}{_HANGUL}][{_MARKS}]*)+|\S[{_MARKS}]*")
_ALONE = re.compile(rf"[{_UNSPACED}{_HANGUL}]")
_NO_BLANK = re.compile(rf"[{_UNSPACED}]")


def words(text: str) -> list[Span]:
    """Return the words of a text: runs of letters and digits, and every other sign alone.

    In Chinese, Japanese, Korean, Thai and the like every character is a word. Marks (accents, vowel signs) go with the
    character before them.
    """
    return [match.span() for match in _WORD.finditer(text)]


def characters(text: str) -> list[Span]:
    """Return the characters of a text that are not white space."""
    return [match.span() for match in re.finditer(r"\S", text)]


def by_character(text: str) -> bool:
    """Whether most words of a text are single characters, as in Chinese."""
    return _most(_ALONE, [text[start:end] for start, end in words(text)])


def pieces(text: str, spans: list[Span]) -> list[str]:
    """Return the words at ``spans`` as they are encoded, each with the text between it and the word before."""
    ends = [0, *(end for _, end in spans)]
    return [text[before:end] for before, (_, end) in zip(ends, spans, strict=False)]


def running(words: list[str]) -> tuple[str, list[Span]]:
    """Return a list of words as running text, and the place of each of them in it.

    Words are joined by a space, or by nothing where most of them are of a script without spaces: ``["a", "bc"]``
    becomes ``a bc`` with places (0, 1) and (2, 4).
    """
    blank = "" if _most(_NO_BLANK, words) else " "
    begins = accumulate((len(word) + len(blank) for word in words), initial=0)
    return blank.join(words), [(begin, begin + len(word)) for begin, word in zip(begins, words, strict=False)]


def _most(kind: re.Pattern[str], words: list[str]) -> bool:
    return 2 * sum(bool(kind.match(word)) for word in words) > len(words)


def encode(tokenizer: Tokenizer, texts: list[list[str]]) -> list[list[list[int]]]:
    """Return the ids of each piece of each text, at least one a piece."""
    distinct = sorted({piece for row in texts for piece in row})
    # SentencePiece tokenizers put a space before every text: it must not be there twice.
    blank = tokenizer.encode("a a") == 2 * tokenizer.encode("a")
    ids = tokenizer.encode_batch([piece.lstrip() for piece in distinct] if blank else distinct)
    found = {piece: row or [tokenizer.unk_id] for piece, row in zip(distinct, ids, strict=True)}
    return [[found[piece] for piece in row] for row in texts]


def means(x_BTD: Tensor, words_BT: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Return the mean state of each word, (N, D), and the number of its tokens, (N,).

    Args:
        x_BTD: states of the tokens.
        words_BT: number of the word that a token is part of; -1: of none.
        num_words: N; a word without tokens has the state 0.
    """
    number = torch.where(words_BT < 0, num_words, words_BT).flatten()
    x = x_BTD.flatten(0, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = x.new_zeros(num_words + 1, x.shape[-1]).index_add(0, number, x)[:num_words]
    counts = x.new_zeros(num_words + 1).index_add(0, number, torch.ones_like(x[:, 0]))[:num_words]
    return (sums / counts.clamp(min=1)[:, None]).to(x_BTD.dtype), counts
