"""The words of a command line: options and their values, short names written out for the typed parser."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import yaml

from llmkit import registry
from llmkit.config import files as config
from llmkit.config.keys import unknown_keys
from llmkit.config.origins import COMMAND_LINE, DEFAULT, Origins, Problem
from llmkit.errors import UserError, note
from llmkit.sequence import DecodingOptions

Words = list[tuple[str, str | None]]


def split(argv: list[str]) -> Words:
    """Return the command line as (option, value) pairs. Raises UserError for a word that belongs to no option."""
    words: Words = []
    for word in argv:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            key, equals, value = word.partition("=")
            words.append((key, value if equals else None))
        elif words and words[-1][1] is None:
            words[-1] = (words[-1][0], word)
        else:
            raise UserError(f"unexpected '{word}' on the command line: options are --key value")
    for key, given in words:
        if given is None and key in ("--config", "-c", "--imports", "--ckpt_path", "--name", "--output"):
            raise UserError(f"{key} needs a value")
    return words


def values(words: Words, *keys: str) -> list[str]:
    """Return every value that is given for one of the keys."""
    return [value for key, value in words if key in keys and value is not None]


def listed(text: str) -> list[str]:
    """Return a value as a list of texts: that of a YAML list, or the text itself."""
    value = parsed(text)
    return [str(item) for item in value] if isinstance(value, list) else [text]


def typed(
    words: Words, tree: dict[str, Any], origins: Origins, problems: list[Problem]
) -> tuple[list[str], dict[str, str]]:
    """Return the options for the typed parser, short names written out, and the class of each plugin's key.

    Their places are put on top of ``origins``, mistakes are added to ``problems``.
    """
    places = Origins(COMMAND_LINE)
    args: list[str] = []
    current = {key: _class_path(tree, key) for key in config.SPEC_KEYS}
    decoding: dict[str, Any] = {}
    for key, value in words:
        name = key.removeprefix("--")
        if key in ("--config", "-c", "--imports"):
            continue
        if name.startswith("print_config") or name.endswith(".help"):
            args.append(key if value is None else f"{key}={value}")
            continue
        if value is None:
            problems.append(Problem(name, f"{COMMAND_LINE}: {key}: expected one argument"))
            continue
        if name.removesuffix(".class_path") in config.SPEC_KEYS:
            name = name.removesuffix(".class_path")
        group, _, rest = name.partition(".")
        leaf, _, inner = rest.partition(".")
        leaf = leaf.rstrip("+")
        argument = inner.removeprefix("init_args.").partition(".")[0]
        spec_key = f"{group}.{leaf}"
        places.put(name.rstrip("+"), parsed(value))
        given: Any = parsed(value)
        if spec_key == "model.decoding" and argument:
            given = {argument: given}
        wrong = unknown_keys({group: {leaf: given} if rest else given}, places)
        if wrong:
            problems += wrong
            continue
        if spec_key in current and argument and current[spec_key]:
            spec = {"class_path": current[spec_key], "init_args": {argument: parsed(value)}}
            config.expand_value(spec_key, spec, places, problems, complete=False)
        if name in config.SPEC_KEYS:
            value, chosen = config.argument(name, value, problems)
            if chosen not in ("", current[name]):
                _note_dropped(tree, name, chosen)
            current[name] = chosen
        if spec_key == "model.decoding" and argument:
            decoding[argument] = parsed(value)
        args.append(f"--{name}={value}")
    origins.update(places)
    if not problems:
        _check_decoding(tree, current["model.head"], decoding, origins, problems)
    return args, current


def parsed(text: str) -> Any:
    """Return the value that a word of the command line stands for; the word itself where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check_decoding(
    tree: dict[str, Any], head: str, given: dict[str, Any], origins: Origins, problems: list[Problem]
) -> None:
    """Put the head's own decoding options below what is given, and check that all are in range."""
    cls = registry.target_of(registry.resolve("head", head or None))
    options = {**dataclasses.asdict(cls.decoding), **(tree["model"].get("decoding") or {})}
    for name in options:
        if origins.of(f"model.decoding.{name}") == DEFAULT:
            origins.put(f"model.decoding.{name}", None, f"{DEFAULT} of {cls.__name__}")
    try:
        DecodingOptions(**{**options, **given})
    except ValueError as error:
        key = f"model.decoding.{str(error).partition(' ')[0]}"
        problems.append(Problem(key, f"{origins.at(key)}: model.decoding.{error}"))
    except TypeError:
        pass  # not a number: the typed parser says so
    tree["model"]["decoding"] = options


def _note_dropped(tree: dict[str, Any], key: str, chosen: str) -> None:
    """Tell which arguments of the config's class do not apply to the one chosen on the command line."""
    group, _, leaf = key.partition(".")
    spec = tree[group].get(leaf)
    given = spec.get("init_args", {}) if isinstance(spec, dict) else {}
    parameters = inspect.signature(config.class_of(key, chosen)).parameters
    dropped = [f"{name}: {value}" for name, value in given.items() if name not in parameters]
    if dropped:
        note(f"{key} is {chosen.rpartition('.')[2]} now; {', '.join(dropped)} of the config does not apply")


def _class_path(tree: dict[str, Any], key: str) -> str:
    group, _, leaf = key.partition(".")
    part = tree.get(group)
    spec = part.get(leaf) if isinstance(part, dict) else None
    return str(spec.get("class_path", "") if isinstance(spec, dict) else spec or "")
