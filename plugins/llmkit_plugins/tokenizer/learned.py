"""Tokenizers that learn words or pieces of words."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from llmkit.errors import UserError

from .base import NO_TEXT, ROLES, SPECIALS, HuggingFace, Own, byte_level, checked, parse, rust_errors

# Training takes time quadratic in the length of a word (text without spaces has very long ones), so long ones are cut
# there; it loses little by that.
CUT = pre_tokenizers.Split(Regex(r"[\s\S]{1,256}"), "isolated")


class _Learned(Own, HuggingFace):
    """A model of ``tokenizers`` that is trained here."""

    def __init__(self, vocab_size: int, pieces: int = 1, what: str = "one piece") -> None:
        self._check_size(vocab_size, len(ROLES) + pieces, what)
        self._limit = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._ready().get_vocab_size()

    def train(self, texts: Iterator[str]) -> None:
        with rust_errors(f"tokenizer {type(self).__name__}: training failed"):
            hf = self._learn(checked(texts))
        if hf.get_vocab_size() == len(ROLES):
            raise UserError(NO_TEXT)  # there was nothing but white space
        self._hf = hf

    @abstractmethod
    def _learn(self, texts: Iterator[str]) -> HFTokenizer:
        """Return a trained tokenizer whose first ids are the special ones."""

    def _trainer(self) -> dict[str, Any]:
        return {"vocab_size": self._limit, "special_tokens": SPECIALS, "show_progress": False}

    def _restore(self, data: dict[str, Any]) -> HFTokenizer:
        hf = super()._restore(data)
        specials = {i: token.content for i, token in hf.get_added_tokens_decoder().items() if token.special}
        ids = sorted(hf.get_vocab().values())
        if specials != dict(enumerate(SPECIALS)) or ids != list(range(len(ids))):
            raise self._broken()
        return hf


class Word(_Learned):
    """One token per word; words are what white space (newlines too) separates, and decode joins them by one space.

    Source: as in Bengio et al. 2003, "A Neural Probabilistic Language Model".

    Args:
        vocab_size: most ids; the most frequent words are kept, the others become the unknown token.
        min_frequency: words seen less often than this become the unknown token.
        lowercase: lower all text first.
    """

    lossless = False  # white space

    def __init__(self, vocab_size: int = 32768, min_frequency: int = 1, lowercase: bool = False) -> None:
        super().__init__(vocab_size)
        if min_frequency < 1:
            raise UserError(f"tokenizer Word: min_frequency must be at least 1, got {min_frequency}")
        self._min_frequency = min_frequency
        self._lowercase = lowercase

    def _learn(self, texts: Iterator[str]) -> HFTokenizer:
        hf = HFTokenizer(models.WordLevel(unk_token=SPECIALS[self.unk_id]))
        hf.normalizer = normalizers.Lowercase() if self._lowercase else None
        hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(min_frequency=self._min_frequency, **self._trainer())
        hf.train_from_iterator(texts, trainer)
        return hf


class BPE(_Learned):
    """Byte-level byte-pair encoding, as in GPT-2; loses nothing and knows every text.

    Source: Sennrich et al. 2016, arXiv:1508.07909; byte-level: Radford et al. 2019, "Language Models are Unsupervised
    Multitask Learners", whose splitting into words is used.

    Args:
        vocab_size: most ids, of which 262 are the special tokens and the bytes.
    """

    def __init__(self, vocab_size: int = 8192) -> None:
        super().__init__(vocab_size, 256, "256 bytes")

    def _learn(self, texts: Iterator[str]) -> HFTokenizer:
        hf = byte_level(models.BPE())
        words = hf.pre_tokenizer
        hf.pre_tokenizer = pre_tokenizers.Sequence([words, CUT])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        hf.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **self._trainer()))
        hf.pre_tokenizer = words
        return hf


_CJK = "[\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
_SURPLUS_SPACE = re.compile(
    rf"(?<={_CJK}) (?={_CJK})"
    r"| (?=[.,!?;:%)\]}])|(?<=[(\[{]) "
    r"|(?<=\w) (?=['’] (?:s|t|d|m|re|ve|ll)\b)|(?<=\w ['’]) (?=(?:s|t|d|m|re|ve|ll)\b)"
)


class WordPiece(_Learned):
    """Words cut into the longest known pieces from the left, as in BERT; every CJK ideograph is a word.

    Source: Schuster and Nakajima 2012, "Japanese and Korean Voice Search"; Devlin et al. 2019, arXiv:1810.04805. Runs
    of white space are not kept; decode leaves no space between CJK characters and before punctuation.

    Args:
        vocab_size: most ids; characters, also as continuation of a word, come first.
        lowercase: lower all text first (accents stay).
    """

    lossless = False  # white space, and control characters

    def __init__(self, vocab_size: int = 8192, lowercase: bool = False) -> None:
        super().__init__(vocab_size)
        self._lowercase = lowercase

    def _learn(self, texts: Iterator[str]) -> HFTokenizer:
        hf = HFTokenizer(models.WordPiece(unk_token=SPECIALS[self.unk_id]))
        hf.normalizer = normalizers.BertNormalizer(lowercase=self._lowercase, strip_accents=False)
        hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        hf.decoder = decoders.WordPiece(cleanup=False)
        # The trainer numbers the continuing characters in random order, and ties between merges go by these numbers.
        # Given as special tokens they have fixed numbers; but for that, all words must be known beforehand.
        rough: Counter[str] = Counter()
        for text in texts:
            rough.update(hf.normalizer.normalize_str(text).split())
        words: Counter[str] = Counter()
        for chunk, count in rough.items():
            for word, _ in hf.pre_tokenizer.pre_tokenize_str(chunk):
                words[word[: hf.model.max_input_chars_per_word]] += count  # longer ones are encoded as unknown
        inner = sorted({f"##{character}" for word in words for character in word[1:]})
        characters = {character for word in words for character in word}
        self._check_size(self._limit, len(ROLES) + len(characters) + len(inner), "the characters, alone and continuing")
        trainer = trainers.WordPieceTrainer(**{**self._trainer(), "special_tokens": SPECIALS + inner})
        hf.train_from_iterator(_repeated(words), trainer)
        data = json.loads(hf.to_str())
        data["added_tokens"] = data["added_tokens"][: len(ROLES)]
        return parse(data, "tokenizer WordPiece")

    def published(self) -> dict[str, Any]:
        """Return the content of a ``tokenizer.json`` whose decoder leaves out surplus spaces too."""
        data = super().published()
        replace = {"type": "Replace", "pattern": {"Regex": _SURPLUS_SPACE.pattern}, "content": ""}
        data["decoder"] = {"type": "Sequence", "decoders": [data["decoder"], {"type": "Fuse"}, replace]}
        return data

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return [_SURPLUS_SPACE.sub("", text) for text in super().decode_batch(ids)]


def _repeated(words: Counter[str], most: int = 1000) -> Iterator[str]:
    """Yield texts in which each word stands as often as counted, at most ``most`` times in one text."""
    for word, count in words.items():
        for start in range(0, count, most):
            yield f"{word} " * min(most, count - start)


class Unigram(_Learned):
    """The most probable cut into pieces under a unigram model, as in SentencePiece; spaces are part of the pieces.

    Source: Kudo 2018, arXiv:1804.10959; Kudo and Richardson 2018, arXiv:1808.06226. Spaces are written as U+2581 (which
    therefore decodes as a space), one more of them before the text; runs of other white space are pieces of their own.

    Args:
        vocab_size: most ids; every character seen in training is kept.
    """

    lossless = False  # U+2581

    def __init__(self, vocab_size: int = 8192) -> None:
        super().__init__(vocab_size)

    def _learn(self, texts: Iterator[str]) -> HFTokenizer:
        hf = HFTokenizer(models.Unigram())
        hf.normalizer = normalizers.Prepend("▁")
        steps = [
            pre_tokenizers.Split(Regex(r"[^\S ]+"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
        hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        hf.pre_tokenizer = pre_tokenizers.Sequence([*steps, CUT])
        unk = SPECIALS[self.unk_id]
        hf.train_from_iterator(self._watched(texts), trainers.UnigramTrainer(unk_token=unk, **self._trainer()))
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
        data = json.loads(hf.to_str())
        vocab = data["model"]["vocab"]
        data["model"]["vocab"] = vocab[: len(ROLES)] + _canonical(vocab[len(ROLES) :], self._limit - len(ROLES))
        return parse(data, "tokenizer Unigram")

    def _watched(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the texts. Raises UserError at the end, before training, when the characters need more ids."""
        characters = {"▁"}
        for text in texts:
            characters.update(text)
            yield text
        self._check_size(self._limit, len(ROLES) + len(characters - {" "}), "the characters")


def _canonical(pieces: list[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """Return at most ``most`` of the pieces, every character among them, with scores that each training repeats.

    The trainer sums in random order, which shows in the last digits, and gives characters that its model lost scores
    from the lowest one upwards, 0.0001 apart, in random order: here all of these get the lowest score. It also takes
    too many pieces where the characters alone are as many as asked for.
    """
    lowest = min(score for _, score in pieces)
    single = [(piece, score) for piece, score in pieces if len(piece) == 1]
    lost = lowest + 0.0001 * len(single)
    kept = [(piece, round(lowest if score <= lost else score, 6)) for piece, score in single]
    longer = sorted((-round(score, 6), piece) for piece, score in pieces if len(piece) > 1)
    kept += [(piece, -score) for score, piece in longer[: most - len(single)]]
    return sorted(kept, key=lambda entry: (-entry[1], entry[0]))
