"""What stands around a text: the ids that a tokenizer puts before a text, between the two of a pair, and at the end."""

from __future__ import annotations

from typing import NamedTuple

from llmkit.contracts import Tokenizer


class Framed(NamedTuple):
    """One row of ids with what stands around its texts."""

    ids: list[int]
    types: list[int]
    """Which text of a pair each id belongs to, 0 or 1; the ids between two texts belong to the first."""
    cut: bool
    """Whether it was cut to the longest that is allowed."""


def framed(tokenizer: Tokenizer, first: list[int], second: list[int] | None, max_length: int) -> Framed:
    """Return a text or a pair of texts as a row of at most ``max_length`` ids.

    Of a pair that is too long the longer text is cut first. A tokenizer that puts nothing between two texts gets its
    separator there.

    Args:
        tokenizer: says what stands around.
        first: ids of the text.
        second: ids of the second text of a pair; None: there is none.
        max_length: most ids of the row.
    """
    before, between, after = tokenizer.around
    if second is None:
        room = max(max_length - len(before) - len(after), 1)
        ids = [*before, *first[:room], *after]
        return Framed(ids[:max_length], [0] * min(len(ids), max_length), len(first) > room)
    between = between or [tokenizer.sep_id]
    room = max(max_length - len(before) - len(between) - len(after), 2)
    longest = max(room - len(second), room - room // 2)
    one = first[:longest]
    two = second[: room - len(one)]
    begin, end = [*before, *one, *between], [*two, *after]
    types = [0] * len(begin) + [1] * len(end)
    return Framed([*begin, *end][:max_length], types[:max_length], len(one) + len(two) < len(first) + len(second))
