"""One walk over a tree of settings and the signatures that take them: every mistake, each with its key.

The same walk checks config files, the command line and the description in a checkpoint. It fills in defaults, and it
imports no class that the tree may not name. Types are asked of jsonargparse, one annotation at a time. For example

    check_arguments(LanguageModel, {"dim": "wide", "attention": {"name": "lstm", "heads": 2}}, "model")

returns the settings with a value for each argument that has a default, and the problems ``model.dim: expected a whole
number, got 'wide'`` and ``model.attention: LSTM has no argument 'heads'. ...``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import inspect
import json
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from llmkit import registry
from llmkit.errors import Problem, UserError, nearest
from llmkit.imports import refusal, spec_of

Tree = dict[str, Any]

NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    **dict.fromkeys((list, tuple, Iterable), "a list"),
    **dict.fromkeys((dict, Mapping), "a mapping"),
}
"""Types as people call them."""

PLAIN = {*NAMES, Any, complex, bytes, type(None), set, object, Path, PurePath, os.PathLike, datetime.timedelta}
"""Types whose values are not classes."""

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""A dotted name, as in ``package.module.Class``."""


class Raw(str):
    """A number or truth value of YAML, or a word of the command line: its value or, where only that fits, its text."""

    value: Any

    def __new__(cls, text: str, value: Any = None) -> Raw:
        raw = super().__new__(cls, text)
        raw.value = value
        return raw


def settled(value: Any, as_text: bool = False) -> Any:
    """Return a value in which each ``Raw`` is its value, or its text."""
    if isinstance(value, Raw):
        return str(value) if as_text else settled(value.value)
    if isinstance(value, list):
        return [settled(item, as_text) for item in value]
    if isinstance(value, dict):
        return {name: settled(item, as_text) for name, item in value.items()}
    return value


@functools.cache
def _parser(kind: Any) -> ArgumentParser | None:
    """Return a parser for one value of a type; None for a type that jsonargparse does not check."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=kind)
    except ValueError:
        return None
    return parser


def fits(kind: Any, value: Any) -> bool:
    """Return whether a value is of a type, as jsonargparse sees it."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if kind is Any or (type(value) in kinds and (type(value) is not str or kinds == (kind,))):
        return True  # jsonargparse takes a millisecond to say so
    if value is None:  # which jsonargparse takes for a value left out
        return type(None) in typing.get_args(kind)
    if (parser := _parser(kind)) is None:
        return True
    try:
        found = parser.parse_object({"value": copy.deepcopy(value)})["value"]  # a copy, for it is changed
    except ArgumentError:
        return False
    # Text that jsonargparse would read as a number is still text.
    return not (isinstance(value, str) and isinstance(found, int | float))


def expected(kind: Any) -> list[str]:
    """Return what a type allows, in the words of a message; choices one by one."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return list(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        # Tensor: torch's optimizers take numbers as tensors too.
        parts = [item for item in inner if item is not type(None) and getattr(item, "__name__", "") != "Tensor"]
        return list(dict.fromkeys(name for part in parts for name in expected(part)))
    return [NAMES.get(origin or kind) or f"a {getattr(kind, '__name__', 'value')}"]


@functools.cache
def parameters_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a class by name, in order."""
    return inspect.signature(cls).parameters


@functools.cache
def hints(cls: Any) -> Mapping[str, Any]:
    """Return the types of a class's arguments, with those of its bases for what it passes on."""
    found: dict[str, Any] = {}
    for base in reversed(getattr(cls, "__mro__", [cls])):
        try:
            found |= typing.get_type_hints(base.__init__)
        except (NameError, TypeError, AttributeError):  # names that only type checkers import: no type is known
            found |= dict.fromkeys(getattr(base.__init__, "__annotations__", {}), Any)
    return found


def check_arguments(cls: type, given: Tree, key: str) -> tuple[Tree, list[Problem]]:
    """Return the arguments of a class, typed and with defaults, and everything that is wrong with them, at any depth.

    Args:
        cls: what the arguments are for.
        given: the arguments.
        key: the config key of the class, ``model``, say.
    """
    walk = Walk({})
    return walk.group(cls, given, key), walk.problems()


class Walk:
    """The walk: goes down a tree, returns its values typed and with defaults, and collects problems.

    Args:
        meant: name -> the key that is meant by it. Else it is an argument of that name somewhere in the tree.
    """

    def __init__(self, meant: Mapping[str, str]) -> None:
        self._meant = meant
        self._found: list[Problem] = []
        self._unknown: list[tuple[str, str, Iterable[str]]] = []
        self._classes: list[tuple[str, type]] = []  # each group and plugin, with its key

    def problems(self) -> list[Problem]:
        """Return what is wrong so far; an unknown key with the place where it belongs, or the nearest one."""
        unknown = []
        for prefix, name, allowed in self._unknown:
            homes = [f"{key}.{name}" for key, cls in self._classes if name in parameters_of(cls)]
            home = self._meant.get(name) or min(homes, key=lambda key: key.count("."), default="")
            hint = f" Did you mean '{home}'?" if home else nearest(name, allowed)
            text = f"unknown key '{prefix}{name}'.{hint} Allowed: {', '.join(sorted(allowed))}."
            unknown.append(Problem("", text, f"{prefix}{name}"))
        return unknown + self._found

    def report(self, key: str, text: str, place_of: str = "") -> None:
        """Add a problem."""
        self._found.append(Problem(key, text, place_of))

    def unknown(self, prefix: str, name: str, allowed: Iterable[str]) -> None:
        """Add the problem of a key that does not exist."""
        self._unknown.append((prefix, name, allowed))

    def group(self, cls: type, given: Tree, key: str) -> Tree:
        """Check the arguments of a class that is not named in the config: a group, or a dataclass in it."""
        self._classes.append((key, cls))
        for name in given:
            if name not in parameters_of(cls):
                self.unknown(f"{key}.", name, parameters_of(cls))
        return self.arguments(cls, given, key)

    def arguments(self, cls: type, given: Tree, key: str, passed: Iterable[str] = ()) -> Tree:
        """Check the types of what is given to a class; returns it, and defaults but for what is ``passed`` to it."""
        found, types_of = {}, hints(cls)
        for name, parameter in parameters_of(cls).items():
            if name in given:
                kind, nullable = types_of.get(name, Any), parameter.default is None
                found[name] = self.value(kind, given[name], f"{key}.{name}", nullable)
            elif parameter.default is not parameter.empty and name not in passed:
                with contextlib.suppress(TypeError, ValueError):  # a default that a config cannot hold
                    found[name] = json.loads(json.dumps(parameter.default))
        return found | {name: settled(item) for name, item in given.items() if name not in found}

    def value(self, kind: Any, given: Any, key: str, nullable: bool = False) -> Any:
        """Check one value, and return it typed."""
        value = given.value if isinstance(given, Raw) else given
        if value is None and nullable:
            return None
        if value is not None and (family := registry.family_at(key, value)):
            return self.plugin(family, value, key)
        record = next((item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)), None)
        if record is not None and isinstance(value, dict):
            return self.group(typing.cast(type, record), value, key)
        before = len(self._found)
        value = self.classes(kind, value, key)
        if len(self._found) > before or fits(kind, settled(value)):
            return settled(value)
        if fits(kind, settled(value, as_text=True)):
            return settled(value, as_text=True)
        if isinstance(given, Raw) and fits(kind, str(given)):
            return str(given)
        self.mismatch(kind, value, key)
        return settled(value)

    def mismatch(self, kind: Any, value: Any, key: str) -> None:
        """Add the problem of a value that is not of a type."""
        allowed, got = expected(kind), value if isinstance(value, str) else json.dumps(settled(value), default=str)
        either = " or ".join(filter(None, [", ".join(allowed[:-1]), allowed[-1]]))
        hint = nearest(got, allowed)
        self.report(key, f"expected {either}, got '{got}'{'.' if hint else ''}{hint}")

    def plugin(self, family: str, value: Any, key: str) -> Any:
        """Check the value of a plugin's key, in any of its forms; returns ``{class_path, init_args}``."""
        try:
            spec = registry.expand(family, value)
            if why := refusal(spec["class_path"]):
                raise UserError(why)
            cls = registry.class_of(spec["class_path"], family)
        except UserError as error:
            self._found += [Problem(key, item.text) for item in error.problems]
            return value
        self._classes.append((key, cls))
        return {"class_path": spec["class_path"], "init_args": self.named(cls, spec.get("init_args") or {}, key)}

    def named(self, cls: type, given: Tree, key: str) -> Tree:
        """Check the arguments of a class that the config names."""
        wrong = registry.unknown_arguments(cls, given)
        for name, text in wrong.items():
            self.report(key, text, f"{key}.{name}")
        missing = registry.missing_arguments(functools.partial(cls, **given))
        if missing and not wrong:
            self.report(key, f"{cls.__name__} needs {', '.join(missing)}")
        return self.arguments(cls, given, key, registry.PASSED)

    def classes(self, kind: Any, value: Any, key: str) -> Any:
        """Check every class that is named in a value, at any depth, and its arguments."""
        if isinstance(value, Raw):
            self.classes(kind, value.value, key)
            return value  # which may be meant as text
        if isinstance(value, list | tuple):
            return [self.classes(kind, item, key) for item in value]
        name = _named_class(kind, value)
        if not name and isinstance(value, dict):
            return {part: self.classes(kind, item, f"{key}.{part}") for part, item in value.items()}
        if not name:
            return value
        why = f"'{name[:100]}' would be read as a file: write the class here" if os.path.isfile(name) else ""
        if not why and "." in name:
            why = refusal(name)
        elif not why and not (isinstance(value, str) and fits(kind, value)):
            why = f"unknown class '{name}'. Allowed: a class path."
        if why:
            self.report(key, why)
            return value
        cls = None
        with contextlib.suppress(Exception):  # whatever the module raises: the value is checked against its type
            cls = pkgutil.resolve_name(name)
        written = (value.get("init_args") or {}) if isinstance(value, dict) else {}
        if isinstance(cls, type) and isinstance(written, dict):
            given = self.named(cls, written, key)
            if written:  # its defaults are left to the class
                return {**value, "init_args": {part: given[part] for part in written}}
        return value


def _named_class(kind: Any, value: Any) -> str:
    """Return the class, or the file with one, that a value names where a type is expected; empty: it names none."""
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        return str(value["class_path"])
    if not isinstance(value, str):
        return ""
    if kind is Any:  # no type is known: what can be imported is taken for a class
        return value if CLASS_PATH.fullmatch(value) and spec_of(value.partition(".")[0]) else ""
    named = _takes_class(kind) and (CLASS_PATH.fullmatch(value) or os.path.isfile(value))
    return value if named else ""


def _takes_class(kind: Any) -> bool:
    """Return whether a value of this type may be given as the path of a class or a function."""
    if (typing.get_origin(kind) or kind) in (Callable, type):
        return True
    if typing.get_args(kind):
        return any(_takes_class(item) for item in typing.get_args(kind))
    return isinstance(kind, type) and kind not in PLAIN
