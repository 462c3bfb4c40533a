"""Tasks of associative recall: which value came with this key?"""

from __future__ import annotations

import numpy as np

from llmkit.errors import UserError
from llmkit_plugins.dataset.task import ASK, BLANK, NOTHING, Draw, Task, named, picked


class MultiQueryRecall(Task):
    """Key-value pairs, then each key once more: ``a3 b7 a1 b2 _ a1 _ a3`` asks for b2 after a1 and b7 after a3.

    Source: MQAR, Arora et al. 2023, arXiv:2312.04927. The keys come again at places whose distance from the pairs
    follows a power law, with blanks between them.

    Args:
        pairs: number of pairs.
        length: symbols of a row, at least 3 for each pair; several: rows of each of these lengths.
        keys: number of different keys.
        values: number of different values.
        power: exponent of the power law; 1: all places are equally likely.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(
        self,
        pairs: int = 8,
        length: int | list[int] = 64,
        keys: int = 64,
        values: int = 64,
        power: float = 0.01,
        examples: int = 10000,
        seed: int = 0,
    ) -> None:
        super().__init__(length, examples, seed)
        self.at_least(1, pairs=pairs, values=values)
        self.at_least(pairs, keys=keys)
        self.at_least(3 * pairs, length=min(self.lengths))
        self.pairs, self.keys, self.values, self.power = pairs, keys, values, power

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        keys = [f"a{number}" for number in draw.choice(self.keys, self.pairs, replace=False)]
        values = picked(draw, named("b", self.values), self.pairs)
        begin = [symbol for pair in zip(keys, values, strict=True) for symbol in pair]
        rest = length - len(begin)
        symbols, expected = begin + [BLANK] * rest, [NOTHING] * length
        weights = np.arange(1, rest + 1) ** (self.power - 1.0)
        places = draw.choice(rest, self.pairs, replace=False, p=weights / weights.sum())
        for place, key, value in zip(places, keys, values, strict=True):
            symbols[len(begin) + place], expected[len(begin) + place] = key, value
        return symbols, expected


class Induction(Task):
    """Random symbols with one marker among them and one at the end: what followed the first one?

    ``a4 a1 ? a7 a2 a0 ?`` asks for a7. Source: induction heads, Olsson et al. 2022, arXiv:2209.11895; in this form Gu
    and Dao 2023, arXiv:2312.00752.

    Args:
        length: symbols of a row; several: rows of each of these lengths.
        symbols: number of different symbols.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(self, length: int | list[int] = 64, symbols: int = 16, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, examples, seed)
        self.at_least(3, length=min(self.lengths))
        self.at_least(2, symbols=symbols)
        self.symbols = symbols

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        symbols = picked(draw, named("a", self.symbols), length)
        place = int(draw.integers(length - 2))
        symbols[place] = symbols[-1] = ASK
        return symbols, [NOTHING] * (length - 1) + [symbols[place + 1]]


class InContextRecall(Task):
    """Key-value pairs in a row, keys drawn again and again; each key that came before asks for its value.

    Source: in-context recall of MAD, Poli et al. 2024, arXiv:2403.17844, in its form with several questions. MAD trains
    on all next symbols, here only answers count.

    Args:
        length: symbols of a row, even; several: rows of each of these lengths.
        keys: number of different keys.
        values: number of different values.
        noise: share of the pairs that are replaced by two symbols of noise.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(
        self,
        length: int | list[int] = 128,
        keys: int = 8,
        values: int = 8,
        noise: float = 0.0,
        examples: int = 10000,
        seed: int = 0,
    ) -> None:
        super().__init__(length, examples, seed)
        self.even()
        self.at_least(4, length=min(self.lengths))
        self.at_least(1, keys=keys, values=values)
        if not 0 <= noise < 1:
            raise UserError(f"noise must be at least 0 and below 1, got {noise}")
        self.keys, self.values, self.noise = keys, values, noise

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row; its first pair is not noise, and its last one asks."""
        count = length // 2
        noisy = draw.random(count) < self.noise
        noisy[[0, -1]] = False
        keys, value_of = draw.integers(self.keys, size=count), draw.integers(self.values, size=self.keys)
        keys[-1] = draw.choice(keys[:-1][~noisy[:-1]])
        noise = draw.integers(16, size=(count, 2))
        symbols: list[str] = []
        expected: list[str] = []
        known = set()
        for number, key in enumerate(keys.tolist()):
            if noisy[number]:
                symbols += [f"n{kind}" for kind in noise[number]]
                expected += [NOTHING] * 2
                continue
            value = f"b{value_of[key]}"
            symbols += [f"a{key}", value]
            expected += [value if key in known else NOTHING, NOTHING]
            known.add(key)
        return symbols, expected


class NoisyRecall(InContextRecall):
    """In-context recall with symbols of noise between the pairs.

    Source: noisy in-context recall of MAD, Poli et al. 2024, arXiv:2403.17844: a fifth is noise, of 16 symbols.

    Args:
        length: symbols of a row, even; several: rows of each of these lengths.
        keys: number of different keys.
        values: number of different values.
        noise: share of the pairs that are replaced by two symbols of noise.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(
        self,
        length: int | list[int] = 128,
        keys: int = 8,
        values: int = 8,
        noise: float = 0.2,
        examples: int = 10000,
        seed: int = 0,
    ) -> None:
        super().__init__(length, keys, values, noise, examples, seed)


class FuzzyRecall(Task):
    """In-context recall whose keys and values are runs of one to three symbols.

    ``a1 a4 a2 b3 b0 ... a1 a4 a2 b3`` asks for b3 after the second a2, and for b0 after the b3. Only keys of full size
    that came before ask: after a shorter one, more of it might follow. Source: fuzzy in-context recall of MAD, Poli et
    al. 2024, arXiv:2403.17844, which draws from all keys there are; here each row has a few.

    Args:
        pairs: number of different keys of a row.
        length: symbols of a row; several: rows of each of these lengths.
        keys: number of different symbols of keys.
        values: number of different symbols of values.
        size: symbols of the longest key and the longest value.
        examples: rows of each length.
        seed: of all draws.
    """

    def __init__(
        self,
        pairs: int = 6,
        length: int | list[int] = 128,
        keys: int = 7,
        values: int = 7,
        size: int = 3,
        examples: int = 10000,
        seed: int = 0,
    ) -> None:
        super().__init__(length, examples, seed)
        self.at_least(1, pairs=pairs, size=size)
        self.at_least(size, keys=keys, values=values)
        self.at_least(4 * size, length=min(self.lengths))
        self.pairs, self.keys, self.values, self.size = pairs, keys, values, size

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row; blanks at its start fill it up."""

        def run(letter: str, count: int, size: int) -> tuple[str, ...]:
            return tuple(f"{letter}{number}" for number in draw.choice(count, size, replace=False))

        sizes = [self.size, *draw.integers(1, self.size + 1, size=self.pairs - 1)]
        known = {run("a", self.keys, n): run("b", self.values, int(draw.integers(1, self.size + 1))) for n in sizes}
        certain = next(iter(known))
        # A key of full size stands somewhere and at the end; there are as many others as there is room for.
        room = length - 2 * len(certain + known[certain])
        drawn: list[tuple[str, ...]] = []
        for index in draw.integers(len(known), size=length):
            key = list(known)[index]
            room -= len(key + known[key])
            if room < 0:
                break
            drawn.append(key)
        drawn.insert(draw.integers(len(drawn) + 1), certain)
        symbols: list[str] = []
        expected: list[str] = []
        before: set[tuple[str, ...]] = set()
        for key in [*drawn, certain]:
            value = known[key]
            asks = key in before and len(key) == self.size
            symbols += [*key, *value]
            expected += [NOTHING] * (len(key) - 1) + [*(value if asks else [NOTHING] * len(value)), NOTHING]
            before.add(key)
        fill = length - len(symbols)
        return [BLANK] * fill + symbols, [NOTHING] * fill + expected
