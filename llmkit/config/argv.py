"""The command line: options and their values, as the topmost layers of a config."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from llmkit import registry
from llmkit.check import Raw
from llmkit.config.files import parse_yaml
from llmkit.config.layers import COMMAND_LINE, Layer
from llmkit.errors import UserError

SHORT = {"seed": "seed_everything"}
"""Options that stand for a key of another name."""
PASSED_ON = re.compile(r"--(print_config|\S+\.help)\b")
"""Options that LightningCLI answers itself."""


class CommandLine(NamedTuple):
    """What the words after a command say."""

    files: list[str]
    """The config files."""
    layers: list[Layer]
    """One for each option that is a config key: later options are above earlier ones."""
    passed_on: list[str]
    """Options that LightningCLI answers itself."""


def read(argv: list[str]) -> CommandLine:
    """Return what a command line says.

    ``--model.attention lstm`` chooses a plugin, ``--model.attention.num_heads 2`` sets an argument of it, and
    ``--trainer.callbacks+=NAME`` appends to a list.

    Raises UserError for a word that belongs to no option, and for an option that needs a value.
    """
    found = CommandLine([], [], [])
    for option, text in _split(argv):
        if PASSED_ON.match(option):
            found.passed_on.append(option if text is None else f"{option}={text}")
        elif text is None:
            raise UserError(f"{COMMAND_LINE}: {option} needs a value")
        elif option in ("--config", "-c"):
            found.files.append(text)
        else:
            found.layers.append(_layer(option.removeprefix("--"), text))
    return found


def _split(argv: list[str]) -> list[tuple[str, str | None]]:
    options: list[tuple[str, str | None]] = []
    for word in argv:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            key, equals, value = word.partition("=")
            options.append((key, value if equals else None))
        elif options and options[-1][1] is None:
            options[-1] = (options[-1][0], word)
        elif options and options[-1][0] == "--imports" and word.endswith(".py"):
            options.append(("--imports", word))
        else:
            raise UserError(f"unexpected '{word}' on the command line: options are --key value")
    return options


def _layer(key: str, text: str) -> Layer:
    """Return the layer of one option."""
    key = SHORT.get(key, key)
    value: Any = raw(text)
    if key == "imports":
        value = value.value if isinstance(value, Raw) and isinstance(value.value, list) else text.split(",")
    elif key in registry.FAMILY_OF or (key in registry.DATASETS and text.lstrip().startswith("{")):
        value = _plugin(key, text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return Layer(value, COMMAND_LINE)


def _plugin(key: str, text: str) -> Any:
    """Return the value of a plugin's key: a name, or YAML in braces or brackets."""
    if text in ("null", "None"):
        return None
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{COMMAND_LINE}: {key}: not valid YAML: {text}") from error


def raw(text: str) -> str:
    """Return a word of the command line: ``Raw`` where YAML reads it as something else than this text."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    value = value.value if isinstance(value, Raw) else value
    return text if value == text else Raw(text, value)
