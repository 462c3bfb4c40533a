"""Exact match and F1 of an answer, as the official scripts of SQuAD and CMRC compute them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter


def answer_scores(answer: str, references: list[str], by_character: bool = False) -> tuple[float, float]:
    """Return exact match and F1 of an answer, 0 to 1, each against the reference where it is best.

    By word it is what SQuAD's official script computes (Rajpurkar et al. 2016, arXiv:1606.05250): F1 of the common
    words, in lower case, without ASCII punctuation and the articles a, an and the. By character, for scripts without
    spaces between words, it is the same for single characters, without punctuation and white space.
    Without references both are 1 for an empty answer and else 0, as in SQuAD 2.0's (Rajpurkar et al. 2018).
    """
    words = _answer_words(answer, by_character)
    if not references:
        return float(not words), float(not words)
    exact = best = 0.0
    for reference in references:
        expected = _answer_words(reference, by_character)
        exact = max(exact, float(words == expected))
        common = (Counter(words) & Counter(expected)).total()
        best = max(best, 2 * common / max(1, len(words) + len(expected)))
    return exact, best


def cmrc_scores(answer: str, references: list[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer, 0 to 1, as CMRC 2018's official script computes them.

    Cui et al. 2019, arXiv:1810.07366: each against the reference where it is best; F1 is of the longest run of units
    that both have, of Chinese characters and of the words between them, in lower case and without punctuation. Words
    are runs of letters and digits, and every other sign alone, where the script has those of NLTK.
    """
    found, exact, best = _cmrc_units(answer), 0.0, 0.0
    for reference in references:
        expected = _cmrc_units(reference)
        exact = max(exact, float(_without_cmrc_signs(answer) == _without_cmrc_signs(reference)))
        best = max(best, 2 * _longest_run(found, expected) / max(1, len(found) + len(expected)))
    return exact, best


_CMRC_SIGNS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
"""The punctuation of CMRC's official script; a run of other signs counts as words."""


def _without_cmrc_signs(text: str) -> str:
    return "".join(c for c in text.lower().strip() if c not in _CMRC_SIGNS)


def _cmrc_units(text: str) -> list[str]:
    return re.findall("[\u4e00-\u9fa5]|[^\\W\u4e00-\u9fa5]+|[^\\w\\s]", _without_cmrc_signs(text))


def _longest_run(a: list[str], b: list[str]) -> int:
    """Return the length of the longest run of units that both lists have."""
    longest, ends = 0, [0] * (len(b) + 1)  # the run that ends at each unit of b, and at the present one of a
    for unit in a:
        ends = [0, *(before + 1 if unit == other else 0 for before, other in zip(ends, b, strict=False))]
        longest = max(longest, *ends)
    return longest


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _answer_words(text: str, by_character: bool) -> list[str]:
    if by_character:
        return [c for c in text.lower() if not (c.isspace() or unicodedata.category(c).startswith("P"))]
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ASCII_PUNCTUATION)).split()
