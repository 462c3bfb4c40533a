"""``llmkit config``: what a config comes to, what differs between two runs, and its schema; one module each."""

from __future__ import annotations

import importlib

from llmkit.errors import UserError, unknown

VERBS = {
    "show": "print the effective config, and where each value comes from",
    "diff": "print what differs between the configs of two runs",
    "schema": "print a JSON schema of configs, for editors",
}
"""Each command and one line of help."""


def run(command: str, argv: list[str]) -> int:
    """Do what the first word says; returns the exit code. Raises UserError when it is none of ``VERBS``."""
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        rows = "\n".join(f"  {name:<8}{text}" for name, text in VERBS.items())
        print(f"usage: llmkit {command} COMMAND [options]\n\ncommands:\n{rows}")
        return 0
    if not verb or verb.startswith("-"):
        raise UserError(f"{command} needs a command: {', '.join(VERBS)}. See 'llmkit {command} --help'.")
    if verb not in VERBS:
        raise UserError(unknown(f"{command} command", verb, VERBS))
    code: int = importlib.import_module(f"llmkit.commands.config.{verb}").run(f"{command} {verb}", argv[1:])
    return code
