"""``llmkit verify resume``: check that a killed and resumed run equals the undisturbed one, to the last bit."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

from llmkit.commands import Parser, at_least
from llmkit.errors import UserError
from llmkit.testing import resume

DESCRIPTION = (
    "Run the first steps of a config twice: undisturbed, and killed by SIGKILL at random moments (in training steps, "
    "in validations, while a checkpoint is written) and resumed each time with --ckpt_path last. Compare every loss, "
    "metric, weight, optimizer and scheduler state bit by bit. Exit code 0: identical; 1: different."
)


def run(command: str, argv: list[str]) -> int:
    """Run the check. Returns 0 if the runs are identical, else 1."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--steps", type=at_least(4), default=40, help="optimizer steps of a run; default: 40")
    add("--kills", type=at_least(1), default=6, help="how often the second run is killed; default: 6")
    add("--kill_seed", type=int, default=0, help="seed for the moments of the kills; default: 0")
    options, argv = parser.parse_known_args(argv)
    log = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="llmkit_verify_", ignore_cleanup_errors=True) as folder:
        try:
            verdict = resume.check(argv, Path(folder), options.steps, options.kills, options.kill_seed, log)
        except resume.RunFailed as error:
            print(error.stderr, end="", file=sys.stderr)
            raise UserError(f"{command}: {error}; see its output above") from error
    if verdict.differences:
        print(f"\nNOT IDENTICAL: {len(verdict.differences)} difference(s), the first:\n  {verdict.differences[0]}")
        return 1
    print(
        f"\nIdentical after {len(verdict.kills)} kill(s): {verdict.batches} losses, {verdict.validations} validations, "
        f"{verdict.tensors} tensors of weights and states, and the results."
    )
    return 0
