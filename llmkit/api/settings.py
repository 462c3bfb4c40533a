"""Python values as the layers of a config, and the objects among them, which a config cannot hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmkit import imports, registry
from llmkit.config.argv import SHORT, CommandLine
from llmkit.config.files import read_yaml
from llmkit.config.layers import OVERRIDES, Layer, Tree
from llmkit.data import DataModule
from llmkit.errors import Problem, UserError, blame, place
from llmkit.model.language_model import LanguageModel

Config = str | Path | list[str | Path] | Mapping[str, Any]
"""A config as Python has it: a file, several of them, or a mapping of the same keys."""


class Given(NamedTuple):
    """What a function was called with."""

    words: CommandLine
    """The settings: files, and a layer for each other key."""
    model: LanguageModel | None
    data: DataModule | None
    trainer: dict[str, list[Any]]
    """Argument of the trainer -> its objects: callbacks, loggers, a strategy."""


def read(config: Config | None, *overrides: Mapping[str, Any]) -> Given:
    """Return settings and objects apart.

    Args:
        config: a file, a list of files, or a mapping.
        overrides: mappings of keys (``model``, ``model.dim``, ``seed``) to values, the later ones above.

    Raises:
        UserError: a value that is neither plain data nor an object that may stand there; a model or data given both as
            an object and as settings.
    """
    files: list[str] = []
    layers: list[Layer] = []
    objects: dict[str, Any] = {"model": None, "data": None}
    trainer: dict[str, list[Any]] = {}
    if isinstance(config, Mapping):
        layers += _layers(config, "config", objects, trainer)
    elif config is not None:
        files = [str(file) for file in (config if isinstance(config, list | tuple) else [config])]
    for mapping in overrides:
        layers += _layers(mapping, OVERRIDES, objects, trainer)
    sets = [key for layer in layers for key in (*layer.tree, *(f"data.{name}" for name in layer.tree.get("data", ())))]
    if not files and objects["data"] is None and {"data.train", "data.source", "ckpt_path"}.isdisjoint(sets):
        raise UserError("a config is needed: a file, a mapping, or at least data={'train': FILE}")
    given = {group: value for group, value in objects.items() if value is not None}
    for layer in [*map(read_yaml, files if given else []), *layers]:
        for group in given.keys() & layer.tree.keys():
            text = f"is an object here, which has its settings already: leave it out of {layer.at(group)}"
            raise UserError(Problem(group, text))
    layers += [Layer({group: _description(group, value)}, f"the {group} given") for group, value in given.items()]
    return Given(CommandLine(files, layers, []), objects["model"], objects["data"], trainer)


def _layers(
    mapping: Mapping[str, Any], source: str, objects: dict[str, Any], trainer: dict[str, list[Any]]
) -> Iterator[Layer]:
    """Yield a layer for each key of a mapping; objects go into ``objects`` and ``trainer`` instead."""
    for key, value in mapping.items():
        key = SHORT.get(key, key)
        kind = {"model": LanguageModel, "data": DataModule}.get(key)
        if kind is not None and isinstance(value, kind):
            objects[key] = value
            continue
        if kind is not None and not isinstance(value, Mapping):
            text = f"expected a mapping or a llmkit.{kind.__name__}, got {_kind(value)}"
            raise UserError(Problem(key, text))
        if key.partition(".")[0] == "trainer":
            value = _without_objects(value, key, trainer)
        tree: Any = plain(value, key)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        yield Layer(tree, source)


def _without_objects(value: Any, key: str, trainer: dict[str, list[Any]]) -> Any:
    """Return the settings of the trainer below a key; objects go into ``trainer``, by argument."""
    if key == "trainer" and isinstance(value, Mapping):
        return {name: _without_objects(item, f"trainer.{name}", trainer) for name, item in value.items()}
    items = value if isinstance(value, list | tuple) else [value]
    objects = [item for item in items if not _is_setting(item)]
    if not objects:
        return value
    trainer[key.partition(".")[2].rstrip("+")] = objects
    return [item for item in items if _is_setting(item)] or None


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, str | Path | numbers.Number | Mapping | list | tuple | type)


def plain(value: Any, key: str) -> Any:
    """Return a value as a config has it: paths as text, a plugin's class or factory as ``{class_path, init_args}``.

    Raises UserError for anything else that is not plain data.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Real):  # of numpy
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, key) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value), key)
    if isinstance(value, type | functools.partial):
        with blame(key):
            spec = registry.spec_of(value)
        check_named(spec["class_path"], key, registry.target_of(value))
        return plain(spec, key)
    raise UserError(Problem(key, f"expected plain data, or a plugin's class, got {_kind(value)}"))


def check_named(class_path: str, key: str, cls: Any) -> None:
    """Raise UserError for a class that a checkpoint could not name: it would be of no use afterwards."""
    if imports.refusal(class_path):
        name = class_path.rpartition(".")[2]
        family = registry.FAMILY_OF.get(key, "attention")
        text = f"{place(cls)} is not registered: put @register('{family}', '{name.lower()}') above it"
        raise UserError(Problem(key, text))


def _description(group: str, value: Any) -> Tree:
    """Return the settings that build an equal model, its weights apart, or equal data."""
    if isinstance(value, LanguageModel):
        for name, factory in value.parts.factories.items():
            check_named(value.spec[name]["class_path"], f"model.{name}", registry.target_of(factory))
        described: Tree = json.loads(json.dumps(value.spec, default=str))
        return described
    return {name: plain(item, f"data.{name}") for name, item in value.arguments.items() if item is not None}


def _kind(value: Any) -> str:
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"
