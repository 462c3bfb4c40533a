"""Time limits that a busy machine does not break."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TRIES = 5


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns; at least one of five takes no more CPU time than this.

    The limit is ten times of what is usual, or more: what makes one call slow (another process in the caches, a
    collection of garbage) does not make five of them ten times as slow. A quadratic algorithm does.
    """
    spent = []
    for _ in range(TRIES):
        start = time.process_time()
        result = call()
        spent.append(time.process_time() - start)
        if spent[-1] <= seconds:
            return result
    raise AssertionError(f"each of {TRIES} calls took more than {seconds} s: {[f'{each:.2g}' for each in spent]}")
