"""The command line: options and their values, as the topmost layer of a config."""

from __future__ import annotations

import re
from typing import Any

import yaml

from llmkit import registry
from llmkit.check import Raw
from llmkit.config.files import parse_yaml
from llmkit.config.layers import COMMAND_LINE, Layer, Tree
from llmkit.errors import Problem, UserError

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


def values(options: Options, *keys: str) -> list[str]:
    """Return every value that is given for one of the keys."""
    return [value for key, value in options if key in keys and value is not None]


def listed(text: str) -> list[str]:
    """Return the names in a value: those of a YAML list, or of names with commas between them."""
    value = raw(text).value
    return [str(item) for item in value] if isinstance(value, list) else text.split(",")


def raw(text: str) -> Raw:
    """Return a word of the command line with its YAML value; the word itself where it is not YAML."""
    word = Raw(text)
    try:
        word.value = parse_yaml(text)
    except yaml.YAMLError:
        word.value = text
    return word


def layer(options: Options, problems: list[Problem]) -> Layer:
    """Return the layer of the options that are config keys; later ones are above earlier ones.

    ``--model.attention lstm`` chooses a plugin, ``--model.attention.num_heads 2`` sets an argument of it, and
    ``--trainer.callbacks+=NAME`` appends to a list.
    """
    tree: Tree = {}
    for option, text in options:
        key = option.removeprefix("--")
        if text is None:
            problems.append(Problem("", f"{COMMAND_LINE}: {option} needs a value"))
            continue
        group, _, rest = key.replace(".init_args.", ".").partition(".")
        name, _, inner = rest.partition(".")
        if inner == "class_path":
            inner = ""
        plugin = f"{group}.{name}"
        if plugin in registry.FAMILY_OF and inner:
            spec = _spec(tree, group, name)
            spec.setdefault("init_args", {})[inner] = raw(text)
            continue
        node = tree
        *above, last = key.removesuffix(".class_path").split(".")
        for part in above:
            if isinstance(node.get(part), str):  # a class by its name, which gets arguments now
                node[part] = {"class_path": str(node[part]), "init_args": {}}
            node = node.setdefault(part, {})
            node = node.get("init_args", node) if last != "class_path" else node
        node[last] = _plugin(plugin, text, problems) if plugin in registry.FAMILY_OF else raw(text)
    return Layer(tree, COMMAND_LINE)


def _spec(tree: Tree, group: str, name: str) -> Tree:
    """Return the plugin at a key of the tree as a mapping that arguments can be put into."""
    part = tree.setdefault(group, {})
    value = part.get(name)
    if isinstance(value, str | dict) and value:
        try:
            part[name] = registry.expand(registry.FAMILY_OF[f"{group}.{name}"], value)
        except UserError:  # the check of the whole tree reports it
            return {}
    return part.setdefault(name, {}) if not isinstance(part.get(name), dict) else part[name]  # type: ignore[no-any-return]


def _plugin(key: str, text: str, problems: list[Problem]) -> Any:
    """Return the value of a plugin's key: a name, or YAML in braces."""
    if text in ("null", "None"):
        return None
    if not text.lstrip().startswith("{"):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        problems.append(Problem(key, f"not valid YAML: {text}"))
        return None
