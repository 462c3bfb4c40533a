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
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import torch

from llmkit import registry
from llmkit.commands import Parser
from llmkit.errors import UserError, note
from llmkit.imports import import_modules
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
    parser = Parser(command, "Print a JSON schema of configs, with every plugin that is registered, for editors.")
    parser.add_argument("--output", metavar="FILE", help="write it to this file")
    parser.add_argument(
        "--imports",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE_OR_MODULE",
        help="import these first; they may register plugins",
    )
    options = parser.parse(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints while it is imported is not our answer
        import_modules(options.imports)
        text = json.dumps(schema(), indent=2, ensure_ascii=False)
    if options.output is None:
        print(text)
        return 0
    file = Path(options.output)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--output {file}: {'it is a folder' if file.is_dir() else 'its folder does not exist'}")
    file.write_text(f"{text}\n", encoding="utf-8")
    print(
        f"{file}: for the YAML language server, begin a config with\n# yaml-language-server: $schema={file.resolve()}"
    )
    return 0


def schema() -> Schema:
    """Return the schema of a whole config. A plugin that cannot be imported is told and left out."""
    top = {key: {**of_type(kind), "description": text} for key, (kind, _, text) in TOP.items()}
    definitions: dict[str, Schema] = {}
    for group, cls in GROUPS.items():
        found = arguments(cls)
        for name, argument in found["properties"].items():
            family = registry.FAMILY_OF.get(f"{group}.{name}")
            if family:
                found["properties"][name] = {**argument, "$ref": f"#/$defs/{family}"}
                if name != "cross_attention":
                    found["properties"][name]["default"] = registry.default(family)
                definitions.setdefault(family, choice(family))
            elif group == "trainer" and name in TRAINER_DEFAULTS:
                argument["default"] = TRAINER_DEFAULTS[name]
        top[group] = {**found, "type": ["object", "null"], "description": summary(cls)}
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
    for names, path, cls in _members(family):
        own = arguments(cls, registry.PASSED)
        plain += [] if own["required"] else names
        paths.append(path)
        named = {"name": {"enum": names}, **own["properties"]}
        needs = ["name", *own["required"]]
        forms.append({**own, "description": summary(cls), "properties": named, "required": needs})
        full = {"class_path": {"const": path}, "init_args": own}
        forms.append(_object(full, ["class_path", *(["init_args"] if own["required"] else [])]))
    other = {"class_path": {"type": "string", "pattern": DOTTED, "not": {"enum": paths}}, "init_args": {}}
    short = [{"enum": plain}, {"type": "string", "pattern": DOTTED}]
    return {"anyOf": [*short, *forms, _object(other, ["class_path"]), {"type": "null"}]}


def _members(family: str) -> Iterable[tuple[list[str], str, type]]:
    """Yield the spellings of the short name, the class path and the class of each member of a family."""
    for entry in registry.entries(family).values():
        try:
            cls = entry.load()
            yield (
                sorted({entry.name, cls.__name__} if family in registry.TORCH else {entry.name}),
                entry.class_path,
                cls,
            )
        except UserError as error:
            note(f"left out: {error}")


def arguments(cls: type, leave_out: Iterable[str] = ()) -> Schema:
    """Return the schema of the arguments of a class as keys with values."""
    try:
        types_of = get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # a name that only type checkers import: such a class is described without types
        types_of = {}
    described = _descriptions(cls)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    anything = False
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            anything = True
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
    """Return the schema of the values of a type; of what it does not know, any value is right."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in SIMPLE:
        return dict(SIMPLE[kind])
    if origin in SIMPLE:  # PathLike[str]
        return dict(SIMPLE[origin])
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return _any_of([of_type(item) for item in inner if item is not torch.Tensor])
    if origin is tuple and Ellipsis not in inner:
        return {
            "type": "array",
            "prefixItems": [of_type(item) for item in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if origin is Callable or not isinstance(origin or kind, type):
        return {}
    if issubclass(origin or kind, Mapping):
        return {"type": "object", "additionalProperties": of_type(inner[1]) if inner else {}}
    if issubclass(origin or kind, Iterable) and inner:
        return {"type": "array", "items": of_type(inner[0])}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return arguments(kind)
    # Any other class: jsonargparse takes its name, or {class_path, init_args}.
    return {"type": ["string", "object"]}


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
