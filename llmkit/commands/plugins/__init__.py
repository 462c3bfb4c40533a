"""``llmkit plugins``: list, check, show and create plugins; one module each."""

from __future__ import annotations

from llmkit.commands import run_verb

VERBS = {
    "check": "test a plugin against its contract",
    "new": "write a small working plugin to start from",
    "show": "describe a plugin: arguments, abilities, cost",
}


def run(command: str, argv: list[str]) -> int:
    """Run one of ``VERBS``, or list the plugins (of one family, when the only word names it); returns the exit code."""
    words = [word for word in argv[:2] if not word.startswith("-")]
    if len(words) == 2 or (argv[:1] and argv[0] in VERBS):
        return run_verb(VERBS, command, argv)
    from llmkit.commands.plugins import listing

    return listing.run(command, argv)
