"""Progress of the long steps of the preparation: what is being done, how far it is, and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from llmkit.data.batches import world
from llmkit.errors import in_notebook, note

FIRST, NEXT = 2.0, 0.5  # seconds until a bar appears on a terminal, and between its changes
LOGGED = 10.0  # seconds until the first line elsewhere (a log file); the time between two lines doubles with each

Thing = TypeVar("Thing")


class Step:
    """A step that may take long, as a context: after a few seconds, a bar or lines on stderr say so.

    A thread prints them, because a tokenizer is trained in one long call of compiled code.

    Args:
        what: what is done, ``training the tokenizer``.
    """

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Step:
        """Begin."""
        self._begun = time.monotonic()
        if world()[0] == 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def advance(self, count: int = 1) -> None:
        """Count rows that are done."""
        self.count += count

    def counted(self, items: Iterable[Thing]) -> Iterator[Thing]:
        """Yield rows and count them."""
        for item in items:
            self.count += 1
            yield item

    def _watch(self) -> None:
        if not (sys.stderr.isatty() or in_notebook()):
            pause = LOGGED
            while not self._over.wait(pause):
                done = f", {self.count:,} rows" if self.count else ""
                note(f"{self.what}{done}, {time.monotonic() - self._begun:.0f} s")
                pause *= 2
        elif not self._over.wait(FIRST):
            with tqdm(desc=self.what, unit=" rows", leave=False) as bar:
                bar.start_t -= FIRST
                while not self._over.wait(NEXT):
                    bar.update(self.count - bar.n)
                    bar.refresh()
