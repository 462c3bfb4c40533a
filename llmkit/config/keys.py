"""Which keys a config may have, and which one was meant."""

from __future__ import annotations

import inspect
import re
import traceback
import types
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from llmkit import registry
from llmkit.config import files as config
from llmkit.config.messages import null
from llmkit.config.origins import DEFAULT, Origins, Problem
from llmkit.data import DataModule
from llmkit.errors import nearest
from llmkit.model.language_model import LanguageModel
from llmkit.run.saving import Checkpoints
from llmkit.sequence import DecodingOptions

GROUPS: dict[str, type] = {"model": LanguageModel, "data": DataModule, "trainer": pl.Trainer, "checkpoint": Checkpoints}
"""The groups of a config, and the class whose arguments each has."""
TOP_KEYS = ("name", "output", "imports", "seed_everything", *GROUPS, "ckpt_path", "weights_only")


def unknown_keys(tree: dict[Any, Any], origins: Origins) -> list[Problem]:
    """Return one sentence for each key that does not exist, with the nearest one that does, or is null and must not."""
    takes = {group: inspect.signature(cls).parameters for group, cls in GROUPS.items()}
    takes["model.decoding"] = inspect.signature(DecodingOptions).parameters
    problems = [_no_key(origins, str(key), "", TOP_KEYS, tree) for key in tree if key not in TOP_KEYS]
    empty = [key for key in ("name", "output", "seed_everything") if tree.get(key, "") is None]
    problems += [Problem(key, f"{origins.at(key)}: {key}: expected a value, got null") for key in empty]
    for prefix, parameters in takes.items():
        part: Any = tree
        for name in prefix.split("."):
            part = part.get(name) if isinstance(part, dict) else None
        if isinstance(part, dict):
            stray = [str(key) for key in part if key not in parameters]
            problems += [_no_key(origins, key, f"{prefix}.", parameters, tree) for key in stray]
            for name, parameter in parameters.items():
                if part.get(name, "") is None and null(parameter):
                    key = f"{prefix}.{name}"
                    problems.append(Problem(key, f"{origins.at(key)}: {key}: {null(parameter)}"))
        elif part is not None:
            text = f"{prefix}: expected keys with values, got {part!r}"
            problems.append(Problem(prefix, f"{origins.at(prefix)}: {text}"))
    return problems


def _no_key(origins: Origins, key: str, prefix: str, allowed: Iterable[str], tree: dict[Any, Any]) -> Problem:
    whole = f"{prefix}{key}"
    elsewhere = _elsewhere(key, tree)
    hint = f" Did you mean '{elsewhere}'?" if elsewhere else nearest(key, allowed)
    text = f"unknown key '{whole}'.{hint} Allowed: {', '.join(sorted(allowed))}."
    return Problem(whole, f"{origins.at(whole)}: {text}")


def _elsewhere(key: str, tree: dict[Any, Any]) -> str:
    """Return the place of a config where a key of this very name belongs, if there is one."""
    owners: dict[str, Any] = {**GROUPS, "model.decoding": DecodingOptions}
    for spec_key in config.SPEC_KEYS:
        group, _, leaf = spec_key.partition(".")
        part = tree.get(group)
        value = part.get(leaf) if isinstance(part, dict) else None
        spec = config.expand_value(spec_key, value or config.default(spec_key), Origins(), [], complete=False)
        if spec is not None:
            owners[spec_key] = config.class_of(spec_key, spec["class_path"])
    return next((f"{name}.{key}" for name, cls in owners.items() if key in inspect.signature(cls).parameters), "")


def at_fault(error: BaseException, text: str, class_paths: Mapping[str, str], origins: Origins) -> str:
    """Return the key of the part of a config that raised an error, or an empty string.

    It is the innermost plugin on the stack, if the model was being built or the message names an argument of the plugin
    that the user set; else the argument of the trainer that the message of its constructor names.

    Args:
        error: what was raised.
        text: the message.
        class_paths: the class of each plugin's key.
        origins: where the values of the config came from.
    """
    frames: list[types.FrameType] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        cause = cause.__cause__ if cause.__cause__ is not cause else None
    objects = [frame.f_locals.get("self") for frame in reversed(frames)]
    starting = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "__init__"]

    def arguments(key: str, cls: type) -> list[str]:
        takes = set(inspect.signature(cls).parameters) - registry.PASSED
        return [
            name
            for word in re.findall(r"\w+", text)
            if word in takes and origins.of(name := f"{key}.{word}") != DEFAULT
        ]

    classes = [(key, config.class_of(key, path)) for key, path in class_paths.items() if path]
    for key, cls in ((key, cls) for found in objects for key, cls in classes if isinstance(found, cls)):
        asked = arguments(key, cls)
        if asked or any(isinstance(found, (cls, LanguageModel)) for found in starting):
            return asked[0] if asked else key
    if any(isinstance(found, pl.Trainer) for found in starting):
        return next(iter(arguments("trainer", pl.Trainer)), "")
    return ""


def nearest_name(key: str, text: str) -> str:
    """Return the nearest valid value to the one quoted in Lightning's message about a name that it does not know."""
    names: dict[str, list[str]] = {
        "trainer.strategy": StrategyRegistry.available_strategies(),
        "trainer.accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
    }
    value = re.search(r"'([^']*)'", text)
    return nearest(value[1], names[key]) if key in names and value else ""


def is_key(key: str) -> bool:
    """Return whether a config may have a key: of a group's own arguments, those below them are not looked at."""
    group, _, rest = key.partition(".")
    return group in GROUPS and rest.partition(".")[0] in inspect.signature(GROUPS[group]).parameters
