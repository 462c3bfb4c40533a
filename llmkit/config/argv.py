"""The command line: options and their values, as the topmost layer of a config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from llmkit import registry
from llmkit.check import Raw
from llmkit.config.files import parse_yaml
from llmkit.config.layers import COMMAND_LINE, Layer
from llmkit.errors import Problem, UserError

SHORT = {"--seed": "seed_everything"}
"""Options that stand for a key of another name."""

Options = list[tuple[str, str | None]]


def split(argv: list[str]) -> Options:
    """Return the command line as (option, value) pairs. Raises UserError for a word that belongs to no option."""
    options: Options = []
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
    for key, given in options:
        if given is None and key in ("--config", "-c", "--imports", "--ckpt_path", "--name", "--output"):
            raise UserError(f"{key} needs a value")
    return options


def listed(text: str) -> list[str]:
    """Return the names in a value: those of a YAML list, or of names with commas between them."""
    value = raw(text).value
    return [str(item) for item in value] if isinstance(value, list) else text.split(",")


def raw(text: str) -> Raw:
    """Return a word of the command line with its YAML value; the word itself where it is not YAML."""
    word = Raw(text)
    try:
        value = parse_yaml(text)
        word.value = value.value if isinstance(value, Raw) else value
    except yaml.YAMLError:
        word.value = text
    return word


def layers(options: Options, problems: list[Problem]) -> Iterator[Layer]:
    """Yield a layer for each option that is a config key: later options are above earlier ones.

    ``--model.attention lstm`` chooses a plugin, ``--model.attention.num_heads 2`` sets an argument of it, and
    ``--trainer.callbacks+=NAME`` appends to a list.
    """
    # Other training data leave out the splits of the layers below: those that are given here come first.
    for option, text in sorted(options, key=lambda given: given[0].startswith(("--data.train", "--data.source"))):
        key = SHORT.get(option) or option.removeprefix("--")
        if text is None:
            problems.append(Problem("", f"{COMMAND_LINE}: {option} needs a value"))
            continue
        group, name, *inner = [part for part in key.split(".") if part not in ("init_args", "class_path")] + [""] * 2
        plugin = f"{group}.{name}"
        value: Any = raw(text)
        if plugin in registry.FAMILY_OF:
            argument = ".".join(filter(None, inner))
            value = {"init_args": {argument: value}} if argument else _plugin(plugin, text, problems)
            key = plugin
        elif plugin in registry.DATASETS and not inner[0] and text.lstrip().startswith("{"):
            value = _plugin(plugin, text, problems)
        for part in reversed(key.split(".")):
            value = {part: value}
        yield Layer(value, COMMAND_LINE)


def _plugin(key: str, text: str, problems: list[Problem]) -> Any:
    """Return the value of a plugin's key: a name, or YAML in braces or brackets."""
    if text in ("null", "None"):
        return None
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        problems.append(Problem(key, f"not valid YAML: {text}"))
        return None
