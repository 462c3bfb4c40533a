"""``llmkit plugins``: list, check, show and create plugins; one module each."""

from __future__ import annotations

import importlib

from llmkit.errors import UserError, unknown

VERBS = ("check", "new", "show")


def run(command: str, argv: list[str]) -> int:
    """List the plugins or, when the first word is a verb, do that; returns the exit code."""
    words = [word for word in argv[:2] if not word.startswith("-")]
    if len(words) == 2 and words[0] not in VERBS:
        raise UserError(unknown(f"{command} command", words[0], VERBS))
    verb = argv[0] if argv and argv[0] in VERBS else ""
    module = importlib.import_module(f"llmkit.commands.plugins.{verb or 'listing'}")
    code: int = module.run(f"{command} {verb}", argv[1:]) if verb else module.run(command, argv)
    return code
