"""Exact formulas in the width D and the length T, found from what a plugin counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Powers = tuple[int, int]  # of D and of T
Count = Callable[[int, int], float]

POWERS_D, POWERS_T = (2, 1, 0), (2, 1, 0, -1)


@dataclass(frozen=True)
class Formula:
    """A sum of products of powers of D and T.

    Attributes:
        terms: the coefficient of each product, highest power of D first.
        step: where D is a multiple of it the formula holds.
    """

    terms: dict[Powers, Fraction]
    step: int

    def __call__(self, dim: int, length: int) -> Fraction:
        """Return its value."""
        return sum((factor * _product(dim, length, powers) for powers, factor in self.terms.items()), Fraction())

    def __str__(self) -> str:
        """Return it as it is written: ``4 D^2 + D/4``."""
        if not self.terms:
            return "0"
        first, *others = self.terms.items()
        text = ("-" if first[1] < 0 else "") + _term(*first)
        return text + "".join(f" {'-' if factor < 0 else '+'} {_term(powers, factor)}" for powers, factor in others)


def find(count: Count, dim: int, length: int) -> Formula | None:
    """Return the formula of what is counted, or None when there is none of this form.

    It is solved for at multiples of ``dim`` and ``length`` and has to hold at further ones. What is rounded up with
    the width (a hidden width that is a multiple of 8) has a formula at rounder widths, multiples of 12 ``dim``.
    """
    for step in (dim, 12 * dim):
        lengths = [length * n for n in range(1, 7)]
        dims = [step * n for n in range(1, 6)]
        values = {point: Fraction(count(*point)) for point in itertools.product(dims, lengths)}
        found = _solve({point: values[point] for point in itertools.product(dims[:3], lengths[:4])}, step)
        if all(_equal(found(*point), value) for point, value in values.items()):
            return found
    return None


def _solve(values: dict[Powers, Fraction], step: int) -> Formula:
    """Return the formula that has these values, by Gauss-Jordan elimination in fractions."""
    unknowns = list(itertools.product(POWERS_D, POWERS_T))
    rows = [[*(_product(*point, powers) for powers in unknowns), value] for point, value in values.items()]
    for column in range(len(unknowns)):
        pivot = next(row for row in range(column, len(rows)) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for index, row in enumerate(rows):
            if index != column and row[column]:
                rows[index] = [a - row[column] * b for a, b in zip(row, rows[column], strict=True)]
    # A count in floating point is a neighbour of the fraction that it means.
    factors = [row[-1].limit_denominator(10_000) for row in rows]
    return Formula({powers: factor for powers, factor in zip(unknowns, factors, strict=True) if factor}, step)


def _product(dim: int, length: int, powers: Powers) -> Fraction:
    return Fraction(dim) ** powers[0] * Fraction(length) ** powers[1]


def _equal(left: Fraction, right: Fraction) -> bool:
    return abs(left - right) <= abs(right) / 10**9


def _term(powers: Powers, factor: Fraction) -> str:
    """Return one product without its sign: ``4 D^2``, ``D/4``, ``3 D/(2 T)``."""
    above = [_power(name, power) for name, power in zip("DT", powers, strict=True) if power > 0]
    below = [_power(name, -power) for name, power in zip("DT", powers, strict=True) if power < 0]
    number, divisor = abs(factor.numerator), factor.denominator
    above = [*([f"{number:,}"] if number != 1 or not above else []), *above]
    below = [*([f"{divisor:,}"] if divisor != 1 else []), *below]
    under = f"({' '.join(below)})" if len(below) > 1 else "".join(below)
    return " ".join(above) + (f"/{under}" if under else "")


def _power(name: str, power: int) -> str:
    return name if power == 1 else f"{name}^{power}"
