"""``llmkit config``: print a config in full, compare those of two runs, print their schema; one module each."""

from __future__ import annotations

import functools

from llmkit.commands import run_verb

VERBS = {
    "show": "print the effective config and where each value comes from",
    "diff": "print how the configs of two runs differ",
    "schema": "print a JSON schema of configs, for editors",
}
run = functools.partial(run_verb, VERBS)
