"""Byte-level BPE that remembers: text is cut where no token can span, and a piece seen before is not encoded again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

Numbers = NDArray[np.int64]

SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's white space, which is what GPT-2's pattern takes for it."""

# GPT-2 splits text into words by a pattern that never joins a character with white space after it, nor a letter with
# what is no letter after it; it looks at nothing before a word, and looks ahead only within white space. So words, and
# with them tokens, come out the same when text is cut wherever white space begins, and between an ASCII word and the
# punctuation after it. A word with an apostrophe is not cut.
_PIECE = re.compile(f" ?[A-Za-z]+(?=[ ,.;:!?\n])|[,.;:!?]+(?=[ \n])|[{SPACES}]*[^{SPACES}]+|[{SPACES}]+")

LONGEST = 32  # characters of a piece that is remembered: longer ones (text without spaces) hardly come again
NEW = 0.7  # where more of the text than this is new, remembering it does not pay
MOST = 2**17  # pieces that are remembered, about 40 MB; then the memory begins anew


class Encoder:
    """Encodes texts by one of ``tokenizers``, byte-level BPE of GPT-2's kind 2 to 4 times faster than it does alone.

    Args:
        hf: the tokenizer, without padding and truncation.
    """

    def __init__(self, hf: HFTokenizer) -> None:
        self.hf = hf
        self._num_bytes = _token_bytes(hf)
        self._known: dict[str, Sequence[int]] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special ones: those that ``hf`` gives, to the last."""
        if self._num_bytes is None:
            return self._encode(texts)
        cut = [_PIECE.findall(text) for text in texts]
        missing = set[str]().union(*cut).difference(self._known)
        if sum(map(len, missing)) > NEW * sum(map(len, texts)):
            return self._encode(texts)
        if missing:
            self._add(missing, self._num_bytes)
        found = self._known.__getitem__
        ids = [list(chain.from_iterable(map(found, pieces))) for pieces in cut]
        for piece in missing:
            if len(piece) > LONGEST:
                del self._known[piece]
        if len(self._known) > MOST:
            self._known.clear()
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.hf.encode_batch_fast(texts, add_special_tokens=False)]

    def _add(self, missing: set[str], num_bytes: Numbers) -> None:
        """Encode pieces: all but white space alone as one text, because a call for each would take longer."""
        spaces = [piece for piece in missing if piece[-1] in SPACES]
        self._known.update(zip(spaces, self._encode(spaces), strict=True))
        words = list(missing.difference(spaces))
        # What begins without white space gets a line feed, which is one token whatever stands around it.
        leads = ["" if word[0] in SPACES else "\n" for word in words]
        joined = list(map(str.__add__, leads, words))
        ids = tuple(self._encode(["".join(joined)])[0])  # tuples of numbers cost the garbage collector nothing
        # A piece ends with the token with which as many bytes are reached.
        ends = np.cumsum([len(word.encode()) for word in joined])
        bounds = [0, *(np.searchsorted(np.cumsum(num_bytes[list(ids)]), ends) + 1).tolist()]
        for word, lead, start, end in zip(words, leads, bounds, bounds[1:], strict=False):
            self._known[word] = ids[start + len(lead) : end]


def _token_bytes(hf: HFTokenizer) -> Numbers | None:
    """Return the bytes of text that each id stands for; None unless it is plain byte-level BPE with GPT-2's words."""
    words, model = hf.pre_tokenizer, hf.model
    if not isinstance(model, models.BPE) or not isinstance(words, pre_tokenizers.ByteLevel):
        return None
    if hf.normalizer or words.add_prefix_space or not words.use_regex:
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not all(token.special for token in hf.get_added_tokens_decoder().values()):
        return None  # others are looked for in the text, white space around them too
    vocab = hf.get_vocab(with_added_tokens=False)
    if not vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None  # bytes without a token are left out of the ids
    num_bytes = np.zeros(max(vocab.values()) + 1, np.int64)
    num_bytes[list(vocab.values())] = list(map(len, vocab))  # a character of these names is a byte
    return num_bytes
