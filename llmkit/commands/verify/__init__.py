"""``llmkit verify``: check on your own config that runs resume exactly and that batching changes no number."""

from __future__ import annotations

from llmkit.commands import run_verb

VERBS = {
    "resume": "kill a run at random moments, resume it, and compare every bit with an undisturbed run",
    "metrics": "compute losses, gradients and metrics in many kinds of batches, and compare them",
}


def run(command: str, argv: list[str]) -> int:
    """Run one of ``VERBS``. Returns 0 if the property holds, 1 if not."""
    return run_verb(command, VERBS, argv)
