"""``llmkit config schema``: a JSON schema of configs with every registered plugin, for editors that check YAML.

JSON Schema, draft 2020-12: https://json-schema.org/draft/2020-12.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import os
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import torch

from llmkit import registry
from llmkit.check import hints
from llmkit.commands import Parser, imported
from llmkit.errors import UserError, note
from llmkit.run.cli import GROUPS, TOP, TRAINER_DEFAULTS

Schema = dict[str, Any]

SIMPLE: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    **{kind: {"type": "string"} for kind in (str, Path, os.PathLike, datetime.timedelta)},
    type(None): {"type": "null"},
    Any: {},
}
DOTTED = r"^\w+(\.\w+)+$"


def run(command: str, argv: list[str]) -> int:
    """Print the schema, or write it to a file; returns the exit code."""
    parser = Parser(command, "Print a JSON schema of configs, including every registered plugin, for editors.")
    parser.add_argument("--output", metavar="FILE", help="write the schema to this file instead")
    parser.add_imports()
    options = parser.parse(argv)
    with imported(options.imports):
        text = json.dumps(schema(), indent=2, ensure_ascii=False)
    if options.output is None:
        print(text)
        return 0
    file = Path(options.output).resolve()
    try:
        file.write_text(f"{text}\n", encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output {file}: {error.strerror}") from error
    print(f"{file}: for the YAML language server, begin a config with\n# yaml-language-server: $schema={file}")
    return 0


def schema() -> Schema:
    """Return the schema of a whole config. A plugin that cannot be imported is left out, with a note."""
    top = {key: {**of_type(kind), "description": text} for key, (kind, _, text) in TOP.items()}
    definitions: dict[str, Schema] = {}
    for group, cls in GROUPS.items():
        top[group] = {**arguments(cls), "type": ["object", "null"], "description": summary(cls)}
    for key, family in registry.FAMILY_OF.items():
        group, _, name = key.partition(".")
        argument = top[group]["properties"][name]
        argument["$ref"] = f"#/$defs/{family}"
        if name != "cross_attention":
            argument["default"] = registry.default(family)
            definitions[family] = choice(family)
    definitions["dataset"] = choice("dataset")
    for key in registry.DATASETS:
        argument = top["data"]["properties"][key.partition(".")[2]]
        files = [form for form in argument.pop("anyOf") if form.get("type") != "object"]
        unnamed = {"type": "object", "not": {"type": "object", "required": ["name"]}}
        argument["anyOf"] = [*files, {"$ref": "#/$defs/dataset"}, unnamed]
    for name, value in TRAINER_DEFAULTS.items():
        top["trainer"]["properties"][name]["default"] = value
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmkit config",
        "type": "object",
        "properties": top,
        "additionalProperties": False,
        "$defs": definitions,
    }


def choice(family: str) -> Schema:
    """Return the schema of a plugin, an optimizer or a scheduler: a name, a name with arguments, or a class path."""
    plain: list[str] = []
    forms: list[Schema] = []
    paths: list[str] = []
    for entry in registry.entries(family).values():
        try:
            cls = entry.load()
        except UserError as error:
            note(f"left out of the schema: {error}")
            continue
        names = sorted({entry.name, cls.__name__}) if family in registry.TORCH else [entry.name]
        own = arguments(cls, registry.PASSED)
        plain += [] if own["required"] else names
        paths.append(entry.class_path)
        named = {"name": {"enum": names}, **own["properties"]}
        needs = ["name", *own["required"]]
        forms.append({**own, "description": summary(cls), "properties": named, "required": needs})
        full = {"class_path": {"const": entry.class_path}, "init_args": own}
        forms.append(_object(full, ["class_path", *(["init_args"] if own["required"] else [])]))
    other = {"class_path": {"type": "string", "pattern": DOTTED, "not": {"enum": paths}}, "init_args": {}}
    short: list[Schema] = [{"enum": plain}, {"type": "string", "pattern": DOTTED}]
    if family in registry.LISTS:
        short.append({"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{family}"}})
    return {"anyOf": [*short, *forms, _object(other, ["class_path"]), {"type": "null"}]}


def arguments(cls: type, leave_out: Iterable[str] = ()) -> Schema:
    """Return the schema of the arguments of a class as keys with values."""
    types_of, described = hints(cls), _descriptions(cls)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    anything = False
    for name, parameter in inspect.signature(cls).parameters.items():
        anything = anything or parameter.kind is parameter.VAR_KEYWORD
        if name in leave_out or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        properties[name] = of_type(types_of.get(name, Any))
        if name in described:
            properties[name]["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
        else:
            with contextlib.suppress(TypeError, ValueError):  # a default that YAML cannot hold
                properties[name]["default"] = json.loads(json.dumps(parameter.default, allow_nan=False))
    return {**_object(properties, required), "additionalProperties": anything}


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def of_type(kind: Any) -> Schema:
    """Return the schema of the values of a type; of a type that it does not know, any value is right."""
    origin, inner = get_origin(kind), get_args(kind)
    cls = origin or kind
    if cls in SIMPLE:
        return dict(SIMPLE[cls])
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return _any_of([of_type(item) for item in inner if item is not torch.Tensor])
    if origin is tuple and Ellipsis not in inner:
        items = [of_type(item) for item in inner]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is Callable or not isinstance(cls, type):
        return {}
    if issubclass(cls, Mapping):
        return {"type": "object", "additionalProperties": of_type(inner[1]) if inner else {}}
    if issubclass(cls, Iterable) and inner:
        return {"type": "array", "items": of_type(inner[0])}
    # Any other class: jsonargparse takes its name, or {class_path, init_args}.
    return arguments(cls) if dataclasses.is_dataclass(cls) else {"type": ["string", "object"]}


def _any_of(found: list[Schema]) -> Schema:
    """Return what one of the schemas allows; plain types are put together in one list."""
    if {} in found:
        return {}
    plain = [item["type"] for item in found if set(item) == {"type"}]
    flat = list(dict.fromkeys(name for kind in plain for name in ([kind] if isinstance(kind, str) else kind)))
    joined = [{"type": flat[0] if len(flat) == 1 else flat}] if flat else []
    rest = [item for item in found if set(item) != {"type"}]
    return (joined + rest)[0] if len(joined + rest) == 1 else {"anyOf": joined + rest}


def summary(cls: type) -> str:
    """Return the first line of the documentation of a class."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


@functools.cache
def _descriptions(cls: type) -> dict[str, str]:
    """Return what the documentation of a class and its bases says of each argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for text in (base.__doc__, vars(base).get("__init__", base).__doc__):
            with contextlib.suppress(docstring_parser.ParseError):
                doc = docstring_parser.parse(inspect.cleandoc(text or ""), docstring_parser.DocstringStyle.GOOGLE)
                found |= {item.arg_name: " ".join((item.description or "").split()) for item in doc.params}
    return {name: text for name, text in found.items() if text}
