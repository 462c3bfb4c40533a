"""``llmkit verify``: check on your own config that runs resume exactly and that batching changes no number."""

from __future__ import annotations

import functools

from llmkit.commands import run_verb

VERBS = {
    "resume": "kill a run at random moments, resume it, and compare it bit by bit with an undisturbed run",
    "metrics": "compute losses, gradients and metrics with many ways of batching, and compare them",
}
run = functools.partial(run_verb, VERBS)
