"""``llmkit verify``: proves on the user's own config that runs resume exactly and that batching changes no number."""

from __future__ import annotations

import importlib

from llmkit.errors import UserError, unknown

KINDS = {
    "resume": "kill a run at random moments, resume it, and compare every byte with a run that was left alone",
    "metrics": "compute losses, gradients and metrics in batches of many kinds, and compare them",
}


def run(command: str, argv: list[str]) -> int:
    """Run ``llmkit verify resume`` or ``llmkit verify metrics``; 0: it holds, 1: it does not."""
    rows = "\n".join(f"  {kind:<8} {text}" for kind, text in KINDS.items())
    usage = f"usage: llmkit verify KIND --config FILE [options of fit]\n\nkinds:\n{rows}\n"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    kind, *rest = argv
    if kind not in KINDS:
        raise UserError(unknown("kind of verification", kind, KINDS))
    module = importlib.import_module(f"llmkit.commands.verify.{kind}")
    code: int = module.run(rest)
    return code
