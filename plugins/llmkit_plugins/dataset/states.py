"""Tasks of tracking a state that each symbol changes."""

from __future__ import annotations

from abc import abstractmethod
from itertools import permutations

from llmkit_plugins.dataset.task import NOTHING, Draw, Task, picked


class Tracking(Task):
    """A state that each symbol changes; it is asked for after every symbol, or after the last one alone."""

    def __init__(self, length: int | list[int], every: bool, examples: int, seed: int) -> None:
        super().__init__(length, examples, seed)
        self.every = every

    @abstractmethod
    def states(self, symbols: list[str]) -> list[str]:
        """Return the state after each symbol."""

    @property
    @abstractmethod
    def alphabet(self) -> list[str]:
        """The symbols."""

    def row(self, draw: Draw, length: int) -> tuple[list[str], list[str]]:
        """Return a row."""
        symbols = picked(draw, self.alphabet, length)
        states = self.states(symbols)
        return symbols, states if self.every else [NOTHING] * (length - 1) + states[-1:]


class Parity(Tracking):
    """Bits: is the number of ones so far odd? ``1 0 1 1`` asks for 1, 1, 0, 1.

    Recurrent networks with a non-linear state can; Hahn 2020 (arXiv:1906.06755) shows that softmax attention cannot at
    all lengths.

    Args:
        length: symbols of a row; several: rows of each of these lengths.
        every: whether the state is asked for after every symbol, or after the last one alone.
        examples: rows of each length.
        seed: of all draws.
    """

    alphabet = ["0", "1"]  # noqa: RUF012

    def __init__(self, length: int | list[int] = 32, every: bool = True, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, every, examples, seed)

    def states(self, symbols: list[str]) -> list[str]:
        """Return the parity of each prefix."""
        state, found = 0, []
        for symbol in symbols:
            state ^= int(symbol)
            found.append(str(state))
        return found


class S5(Tracking):
    """Permutations of five things, one applied after the other: in which order are they now?

    ``p10234 p02134`` asks for p10234, then p20134: place i of the new order holds what was at place p(i), so that the
    product of the prefix is written as one permutation. The word problem of the group S5, which is complete for the
    complexity class NC1: Merrill et al. 2024, arXiv:2404.08819.

    Args:
        length: symbols of a row; several: rows of each of these lengths.
        every: whether the product is asked for after every symbol, or after the last one alone.
        examples: rows of each length.
        seed: of all draws.
    """

    alphabet = ["p" + "".join(map(str, order)) for order in permutations(range(5))]  # noqa: RUF012

    def __init__(self, length: int | list[int] = 16, every: bool = True, examples: int = 10000, seed: int = 0) -> None:
        super().__init__(length, every, examples, seed)

    def states(self, symbols: list[str]) -> list[str]:
        """Return the order after each permutation."""
        order, found = "01234", []
        for symbol in symbols:
            order = "".join(order[int(place)] for place in symbol[1:])
            found.append(f"p{order}")
        return found
