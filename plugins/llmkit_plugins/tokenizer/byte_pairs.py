"""Byte-level BPE by tiktoken, several times faster than ``tokenizers``, where both provably give the same ids."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

if TYPE_CHECKING:
    import tiktoken

# GPT-2's words, written so that the pattern never goes back over what it took.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# A letter that each version of Unicode from 10 to 17 added: a library of an older version takes it for a sign.
NEW_LETTERS = "\u312e\u1c90\ua7ba\u31bb\ua7c0\U0001e4d0\U0002ebf0\u1c89\U000323b0"
FEW = 2**15  # characters: ``tokenizers`` encodes them in the time that it takes to make tiktoken ready
LONG = 100_000  # characters of white space that tiktoken is not given: it fails at a million

_SPACE = re.compile(rf"\s{{{LONG}}}")


class Encoder:
    """Encodes texts by one of ``tokenizers``, or by tiktoken once there are many and the ids are the same.

    Args:
        hf: the tokenizer, without padding and truncation.
    """

    def __init__(self, hf: HFTokenizer) -> None:
        self.hf = hf
        self._characters = 0  # encoded so far
        self._fast: tiktoken.Encoding | None = None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special ones: exactly those that ``hf`` gives."""
        before, self._characters = self._characters, self._characters + sum(map(len, texts))
        if before <= FEW < self._characters:
            self._fast = same_by_tiktoken(self.hf)
        if self._fast is None or any(len(text) >= LONG and _SPACE.search(text) for text in texts):
            return [encoding.ids for encoding in self.hf.encode_batch_fast(texts, add_special_tokens=False)]
        return list(map(self._fast.encode_ordinary, texts))


def same_by_tiktoken(hf: HFTokenizer) -> tiktoken.Encoding | None:
    """Return tiktoken's encoding that gives the same ids for every text, or None where that is not certain.

    It is certain for byte-level BPE with GPT-2's words, no normalisation, a token for every byte, and merges as
    training makes them. tiktoken joins the neighbours that together make the oldest token, ``tokenizers`` those of the
    oldest merge. Both do the same when each token comes from one merge, is as old as that and younger than its parts,
    and is what its own bytes are joined to: bytes that become a token are joined as they are when they stand alone.
    """
    import tiktoken

    words, model = hf.pre_tokenizer, hf.model
    plain = isinstance(model, models.BPE) and isinstance(words, pre_tokenizers.ByteLevel)
    if not plain or hf.normalizer or words.add_prefix_space or not words.use_regex:
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    added = hf.get_added_tokens_decoder().values()
    if not all(token.special for token in added):
        return None  # others are looked for in the text
    vocab = hf.get_vocab(with_added_tokens=False)
    for token in added:
        vocab.pop(token.content, None)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not vocab.keys() >= set(alphabet):
        return None  # bytes without a token are left out of the ids
    described = json.loads(hf.to_str())["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in described["merges"]]
    made = [left + right for left, right in merges]
    if described.get("ignore_merges") or vocab.keys() != {*alphabet, *made}:
        return None
    youngest = max(vocab[byte] for byte in alphabet)
    for (left, right), piece in zip(merges, made, strict=True):
        if vocab[piece] <= youngest or max(vocab[left], vocab[right]) >= vocab[piece]:
            return None
        youngest = vocab[piece]
    if any([token.value for token in model.tokenize(piece)] != [piece] for piece in made) or not same_words(words):
        return None
    byte_of = bytes_by_character()
    ranks = {bytes(map(byte_of.__getitem__, piece)): number for piece, number in vocab.items()}
    return tiktoken.Encoding("llmkit", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def same_words(words: pre_tokenizers.ByteLevel) -> bool:
    """Return whether tiktoken and ``tokenizers`` take the same characters for letters."""
    import tiktoken

    texts = [f"a{letter}" for letter in NEW_LETTERS]
    starts = {text.encode()[:2] for text in texts}  # one token, if it is one word
    ranks = {start: number for number, start in enumerate([*(bytes([i]) for i in range(256)), *sorted(starts)])}
    one = tiktoken.Encoding("starts", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return all((one.encode_ordinary(text)[0] > 255) == (len(words.pre_tokenize_str(text)) == 1) for text in texts)


def bytes_by_character() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2)."""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}
