"""Errors that a user can act on, and the nearest valid name for a mistyped one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """What the user can mend: a line on stderr for each problem, exit code 2, no traceback."""

    def __init__(self, *problems: str) -> None:
        super().__init__(" | ".join(problems))
        self.problems = problems


class Stopped(Exception):  # noqa: N818
    """A signal asked the run to stop; it has saved and said how to go on. Its exit code is the shell's for a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.code = 128 + signum


def note(message: str) -> None:
    """Tell the user something worth knowing that is no error."""
    print(f"llmkit: note: {message}", file=sys.stderr, flush=True)


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
