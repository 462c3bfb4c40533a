"""Tasks of keeping symbols: all of them, some of them, in another order, or for good."""

from __future__ import annotations

import numpy as np

from llmkit_plugins.dataset.task import ASK, BLANK, NOTHING, Draw, Task, named, picked


class SelectiveCopying(Task):
    """Symbols among blanks, to be written in their order at the end: ``_ a3 _ _ a1 ? ?`` asks for a3, then a1.

    Source: Gu and Dao 2023, arXiv:2312.00752; selective copying of MAD (Poli et al. 2024, arXiv:2403.17844) is the same
    task.

    Args:
        copies: number of symbols to copy.
        length: symbols of a row, at least 2 for each of them; several: rows of each of these lengths.
        symbols: number of different symbols.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(
        self,
        copies: int = 16,
        length: int | list[int] = 128,
        symbols: int = 16,
        examples: int = 10000,
        seed: int = 0,
    ) -> None:
        super().__init__(length, examples, seed)
        self.at_least(1, copies=copies)
        self.at_least(2, symbols=symbols)
        self.at_least(2 * copies, length=min(self.lengths))
        self.copies, self.symbols = copies, symbols

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        begin = [BLANK] * (length - self.copies)
        copied = picked(draw, named("a", self.symbols), self.copies)
        for place, symbol in zip(sorted(draw.choice(len(begin), self.copies, replace=False)), copied, strict=True):
            begin[place] = symbol
        return begin + [ASK] * self.copies, [NOTHING] * len(begin) + copied


class Sorting(Task):
    """Numbers, to be written in ascending order: ``a7 a2 a5 ? ? ?`` asks for a2, a5, a7.

    Source: sorting as a task of sequence models, Graves et al. 2014, arXiv:1410.5401.

    Args:
        length: symbols of a row, even: half of them are numbers; several: rows of each of these lengths.
        symbols: number of different numbers.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(self, length: int | list[int] = 32, symbols: int = 32, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, examples, seed)
        self.even()
        self.at_least(2, symbols=symbols)
        self.symbols = symbols

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        numbers = draw.integers(self.symbols, size=length // 2)
        written, ordered = ([f"a{number}" for number in row] for row in (numbers, np.sort(numbers)))
        return written + [ASK] * len(written), [NOTHING] * len(written) + ordered


class Compression(Task):
    """Random symbols and an end mark, all to be written again from the hidden state at the mark alone.

    It needs ``model.head: {name: probe, from_last: true}``; any other head sees the symbols that it asks for. Source:
    compression of MAD, Poli et al. 2024, arXiv:2403.17844.

    Args:
        length: symbols of a row; several: rows of each of these lengths.
        symbols: number of different symbols.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(self, length: int | list[int] = 32, symbols: int = 16, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, examples, seed)
        self.at_least(2, length=min(self.lengths), symbols=symbols)
        self.symbols = symbols

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        symbols = picked(draw, named("a", self.symbols), length - 1)
        return [*symbols, ASK], [*symbols, NOTHING]


class Memorization(Task):
    """Keys that ask for values which no row shows: ``a5 ? a2 ?``. The pairs are the same in all rows and splits.

    Only training teaches them, so the answers are kept in the weights. Source: memorization of MAD, Poli et al. 2024,
    arXiv:2403.17844.

    Args:
        length: symbols of a row, even; several: rows of each of these lengths.
        keys: number of keys, each with a value of its own.
        examples: rows of each length.
        seed: of all draws, and of the pairs.
    """

    def __init__(self, length: int | list[int] = 32, keys: int = 128, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, examples, seed)
        self.even()
        self.at_least(2, keys=keys)
        self.keys = keys
        self.values = [f"b{number}" for number in np.random.default_rng(seed).permutation(keys)]

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        keys = draw.integers(self.keys, size=length // 2)
        symbols = [symbol for key in keys for symbol in (f"a{key}", ASK)]
        return symbols, [symbol for key in keys for symbol in (NOTHING, self.values[key])]
