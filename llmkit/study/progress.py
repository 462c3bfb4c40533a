"""The progress line of a study."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from llmkit.errors import in_notebook


class Progress:
    """A line with the number of cells ended, running and failed, and the time left."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._first, self._start, self._shown = done, time.monotonic(), ""
        self._tty = sys.stderr.isatty() or in_notebook()

    def show(self, running: int, failed: int) -> None:
        """Show the line if it has changed; in a log file, whenever a cell has ended."""
        ended = self.done - self._first + failed
        left = ""
        if ended:
            seconds = (time.monotonic() - self._start) / ended * (self.total - self.done - failed)
            left = f", {timedelta(seconds=round(seconds))} left"
        line = f"cells: {self.done} of {self.total} done, {running} running, {failed} failed"
        if line != self._shown:
            self._shown = line
            print(f"\r{line}{left:<20}" if self._tty else line + left, end="" if self._tty else "\n", file=sys.stderr)
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.end()
        print(f"llmkit: {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the line."""
        if self._tty and self._shown:
            print(file=sys.stderr)
        self._shown = ""
