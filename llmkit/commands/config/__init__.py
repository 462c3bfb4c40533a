"""``llmkit config``: print a config in full, compare those of two runs, print their schema; one module each."""

from __future__ import annotations

from llmkit.commands import run_verb

VERBS = {
    "show": "print the effective config, and where each value comes from",
    "diff": "print what differs between the configs of two runs",
    "schema": "print a JSON schema of configs, for editors",
}


def run(command: str, argv: list[str]) -> int:
    """Run one of ``VERBS``; returns the exit code."""
    return run_verb(command, VERBS, argv)
