"""Errors that a user can act on, and the nearest valid name for a mistyped one."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One mistake in a config. Where its value was set is added once, when it is printed."""

    key: str
    """The config key it is about, dotted; empty: no key, the text says it all."""
    text: str
    place_of: str = ""
    """The key whose place to show, if that is not ``key`` itself: an argument of the plugin at ``key``, say."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class UserError(ValueError):
    """An error the user can fix: one line on stderr for each problem, exit code 2, no traceback."""

    def __init__(self, *problems: str | Problem) -> None:
        self.problems = [item if isinstance(item, Problem) else Problem("", item) for item in problems]
        super().__init__(" | ".join(map(str, self.problems)))

    def _render_traceback_(self) -> list[str]:
        """Return the lines that a notebook shows, which are those of the command: its own frames help nobody."""
        return [f"llmkit: error: {' '.join(str(problem).split())}" for problem in self.problems]


class Stopped(Exception):  # noqa: N818
    """A signal asked the run to stop, and it has saved. Its exit code is the shell's for a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.code = 128 + signum


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Attach a config key to what the part at that key raises as a mistake (ValueError, UserError)."""
    try:
        yield
    except UserError as error:
        raise UserError(*(item if item.key else Problem(key, item.text) for item in error.problems)) from error
    except ValueError as error:
        raise UserError(Problem(key, str(error))) from error


@contextmanager
def located(place: str) -> Iterator[None]:
    """Put a place in front of what is raised as a mistake: a file and its line, say."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from error


_noted: set[str] | None = None


def in_notebook() -> bool:
    """Return whether what is printed goes to a notebook, which rewrites lines in place as a terminal does."""
    return type(sys.stderr).__module__.startswith("ipykernel.")


def note(message: str) -> None:
    """Print something worth knowing that is not an error."""
    if _noted is not None:
        if message in _noted:
            return
        _noted.add(message)
    print(f"llmkit: note: {message}", file=sys.stderr, flush=True)


@contextmanager
def each_note_once() -> Iterator[None]:
    """Print a note that comes again and again in the block the first time only."""
    global _noted
    before, _noted = _noted, set()
    try:
        yield
    finally:
        _noted = before


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the valid name closest to ``name``, or an empty string."""
    names = sorted(allowed)
    folded = {candidate.lower(): candidate for candidate in names}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.55)
    return f" Did you mean '{folded[match[0]]}'?" if match else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the standard sentence for a name that is not among ``allowed``."""
    names = sorted(allowed)
    return f"unknown {kind} '{name}'.{nearest(name, names)} Allowed: {', '.join(names) or '(none)'}."


def place(thing: Any) -> str:
    """Return the name of a class or function with its file and line, ``Mine (file mine.py, line 5)``."""
    name = getattr(thing, "__qualname__", repr(thing))
    try:
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):  # typed into a shell, or not written in Python
        return name
    return f"{name} (file {os.path.basename(file or '?')}, line {line})"


def returned(plugin: object, method: str, value: Any, wanted: str) -> UserError:
    """Return the error for a method of a plugin that gave something else than its contract says."""
    found = getattr(type(plugin), method, type(plugin))
    shape = f" of the shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    kind = "nothing" if value is None else f"a {type(value).__name__}{shape}"
    return UserError(f"{place(found)} returned {kind}; the contract wants {wanted}")
