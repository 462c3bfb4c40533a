"""Commands that are not training: one module each, with ``run(command, argv) -> exit code``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from llmkit.errors import UserError, unknown


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line (a UserError) instead of the usage text on a mistake."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"llmkit {command}", description=description, allow_abbrev=False)
        self.command = command

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the parsed options. Raises UserError, naming the nearest option, for what cannot be parsed."""
        options, rest = self.parse_known_intermixed_args(argv)  # options may stand between the texts
        for argument in rest:
            if argument.startswith("-"):
                raise UserError(unknown(f"{self.command} option", argument.split("=")[0], self._option_string_actions))
            self.error(f"what is '{argument}' for? See '{self.prog} --help'.")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's own message."""
        raise UserError(f"{self.command}: {message}")
