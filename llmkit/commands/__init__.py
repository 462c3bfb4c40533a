"""The commands, one module each, with ``run(command, argv) -> exit code``; they print what they were asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from llmkit.errors import UserError, unknown
from llmkit.imports import import_modules

VERBS = {
    "config": {
        "show": "print the effective config and where each value comes from",
        "diff": "print how the configs of two runs differ",
        "schema": "print a JSON schema of configs, for editors",
    },
    "explain": {
        "attribute": "what each token contributes to the answer: integrated gradients, occlusion, by layer",
        "heads": "which heads are induction, previous-token, duplicate or positional heads",
        "lens": "what each layer would answer, and its loss",
        "probe": "what a linear classifier reads off each layer, next to a control task",
    },
    "scale": {
        "fit": "fit the loss by size and tokens to runs in a CSV file, and report what they determine",
    },
    "verify": {
        "resume": "kill a run at random moments, resume it, and compare it bit by bit with an undisturbed run",
        "metrics": "compute losses, gradients and metrics with many ways of batching, and compare them",
        "mup": "train a few steps at several widths, and compare how far outputs move (coordinate check of muP)",
    },
    "plugins": {
        "check": "test a plugin against its contract",
        "new": "write a small working plugin to start from",
        "show": "describe a plugin: arguments, abilities, cost",
    },
}
"""Commands with verbs: one line of help for each verb, which is a module of the command's package."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a mistake is one line (a UserError), without the usage text.

    Args:
        command: the command's name, as typed after ``llmkit``.
        description: the text of ``--help``.
        of_fit: whether the help says that the options of ``fit`` are allowed too; ``parse_known_args`` leaves them.
    """

    def __init__(self, command: str, description: str, of_fit: bool = False) -> None:
        super().__init__(
            prog=f"llmkit {command}",
            description=description,
            usage="%(prog)s --config FILE [options]" if of_fit else None,
            epilog="All options of fit are accepted too: see 'llmkit fit --help'." if of_fit else None,
            allow_abbrev=False,
        )
        self.command = command

    def add_imports(self) -> None:
        """Add ``--imports``; ``imported`` imports what it names."""
        self.add_argument(
            "--imports",
            action="append",
            default=[],
            metavar="FILE_OR_MODULE",
            help="import plugins from a .py file or a module first; may be repeated",
        )

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the parsed options. Raises UserError, suggesting the nearest option, for what cannot be parsed."""
        # Intermixed: options may stand between positional arguments.
        options, rest = self.parse_known_intermixed_args(list(_one_import_each(argv)))
        for argument in rest:
            if argument.startswith("-"):
                raise UserError(unknown(f"{self.command} option", argument.split("=")[0], self._option_string_actions))
            self.error(f"unexpected argument '{argument}'. See '{self.prog} --help'.")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's own message."""
        raise UserError(f"{self.command}: {message}")


def _one_import_each(argv: list[str]) -> Iterator[str]:
    """Yield ``--imports a.py b.py text`` as ``--imports a.py --imports b.py text``.

    ``nargs="+"`` would take the text too, which is a positional argument.
    """
    previous, in_list = "", False
    for word in argv:
        if in_list and word.endswith(".py"):
            yield "--imports"
        else:
            in_list = previous == "--imports" or word.startswith("--imports=")
        yield word
        previous = word


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least ``least``."""

    def number(text: str) -> int:
        if int(text) < least:  # argparse reports a ValueError as "invalid number value: 'x'"
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


@contextlib.contextmanager
def imported(names: list[str]) -> Iterator[None]:
    """Import the values of ``--imports``, each a name or several with commas between them.

    What plugins print, now or within the block, goes to stderr: stdout is for the command's answer.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import_modules([name for value in names for name in value.split(",")])
        yield


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines in which each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def run_verb(command: str, argv: list[str]) -> int:
    """Run ``llmkit COMMAND VERB ...`` and return its exit code; ``plugins`` without a verb lists the plugins.

    Raises UserError when there is no verb, or an unknown one.
    """
    verbs, verb = VERBS[command], argv[0] if argv else ""
    words = [word for word in argv[:2] if not word.startswith("-")]
    # What the command does without a verb.
    unnamed = {"plugins": "listing", "scale": "study", "explain": "rows"}.get(command)
    if command == "plugins" and verb not in verbs and len(words) < 2:  # nothing, options, or the name of a family
        verb, argv = "listing", ["", *argv]
    elif command == "scale" and (not verb or verb.startswith("-")):
        verb, argv = "study", ["", *argv]
    elif command == "explain" and verb not in verbs:
        verb, argv = "rows", ["", *argv]
    elif verb in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10}{text}" for name, text in verbs.items())
        print(f"usage: llmkit {command} COMMAND [options]\n\ncommands:\n{rows}")
        return 0
    elif not verb or verb.startswith("-"):
        raise UserError(f"{command} needs a command: {', '.join(verbs)}. See 'llmkit {command} --help'.")
    elif verb not in verbs:
        raise UserError(unknown(f"{command} command", verb, verbs))
    name = command if verb == unnamed else f"{command} {verb}"
    code: int = importlib.import_module(f"llmkit.commands.{command}.{verb}").run(name, argv[1:])
    return code
