"""One walk over a tree of settings and the signatures that take them: every mistake, each with its key.

The same walk checks config files, the command line and the description in a checkpoint. It fills in defaults, and it
imports no class that the tree may not name. Types are asked of jsonargparse, one annotation at a time. For example

    check_arguments(LanguageModel, {"dim": "wide", "attention": {"name": "lstm", "heads": 2}}, "model")

returns the problems ``model.dim: expected a whole number, got 'wide'`` and ``model.attention: LSTM has no argument
'heads'. ...``, and leaves in the tree what each argument is when nothing is given.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from llmkit import registry
from llmkit.classes import NAMES, is_file, known_classes, load, named_class, spelled_out
from llmkit.errors import Problem, UserError, nearest
from llmkit.imports import refusal

Tree = dict[str, Any]


class Raw(str):
    """A number or truth value of YAML, or a word of the command line: its value or, where only that fits, its text."""

    value: Any = None


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
    if value is None and kind not in (Any, inspect.Parameter.empty):  # which jsonargparse takes for a value left out
        return type(None) in typing.get_args(kind)
    if type(value) is kind and kind in (bool, int, float, str):  # jsonargparse takes a millisecond to say so
        return True
    parser = None if kind in (Any, inspect.Parameter.empty) else _parser(kind)
    try:
        # A copy, for it is changed. Text that jsonargparse would read as a number is still text.
        found = value if parser is None else parser.parse_object({"value": copy.deepcopy(value)})["value"]
    except ArgumentError:
        return False
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


def shown(value: Any) -> str:
    """Return a value as a config would have it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@functools.cache
def parameters_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a class, in order."""
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


def check_arguments(cls: type, given: Tree, key: str, owners: Callable[[str], str] = lambda name: "") -> list[Problem]:
    """Return everything that is wrong with the arguments of a class, at any depth.

    Args:
        cls: what the arguments are for.
        given: the arguments; changed in place: values of the command line become typed, defaults are filled in.
        key: the config key of the class, ``model``, say.
        owners: returns the whole key where an argument of that name belongs, if it is unknown here.
    """
    walk = _Walk(owners)
    walk.group(cls, given, key)
    return walk.problems


def check_value(kind: Any, value: Any, key: str) -> tuple[Any, list[Problem]]:
    """Return one value typed, and everything that is wrong with it."""
    walk = _Walk(lambda name: "")
    return walk.value(kind, value, key), walk.problems


def without_repetition(problems: list[Problem], splits: Iterable[str]) -> list[Problem]:
    """Return problems without those of these splits that they have from ``data.train``."""
    known = {(problem.key, problem.text) for problem in problems}
    inherited = re.compile(rf"data\.({'|'.join(splits) or ' '})\b")
    found = []
    for problem in problems:
        of_train = inherited.sub("data.train", problem.key)
        if of_train == problem.key or (of_train, problem.text) not in known:
            found.append(problem)
    return found


def with_arguments_of_train(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of data with each split whole that says only what is other than in a generated ``train``.

    ``{train: {name: mqar, pairs: 8}, validation: {length: 256}}`` validates on ``{name: mqar, pairs: 8, length: 256}``.
    """
    found = dict(data)
    if registry.family_at("data.train", data.get("train")):
        with contextlib.suppress(UserError):  # which is reported for ``train`` itself
            train = registry.expand("dataset", data["train"])
            for split, value in data.items():
                key = f"data.{split}"
                if key in registry.DATASETS and isinstance(value, Mapping) and not registry.family_at(key, value):
                    own = value.get("init_args", value)
                    found[split] = {**train, "init_args": {**(train.get("init_args") or {}), **own}}
    return found


def unknown_key(prefix: str, name: str, allowed: Iterable[str], elsewhere: str) -> Problem:
    """Return the problem of a key that does not exist, with the nearest one, or the place where it belongs."""
    hint = f" Did you mean '{elsewhere}'?" if elsewhere else nearest(name, allowed)
    return Problem("", f"unknown key '{prefix}{name}'.{hint} Allowed: {', '.join(sorted(allowed))}.", f"{prefix}{name}")


class _Walk:
    """The walk itself: goes down a tree and collects problems."""

    def __init__(self, owners: Callable[[str], str]) -> None:
        self.owners = owners
        self.problems: list[Problem] = []

    def report(self, key: str, text: str, place_of: str = "") -> None:
        self.problems.append(Problem(key, text, place_of))

    def group(self, cls: type, given: Tree, key: str) -> None:
        """Check the arguments of a class that is not named in the config: a group, or a dataclass in it."""
        parameters = parameters_of(cls)
        for name in [name for name in given if name not in parameters]:
            self.problems.append(unknown_key(f"{key}.", str(name), parameters, self.owners(str(name))))
        self.arguments(cls, given, key)

    def arguments(self, cls: type, given: Tree, key: str, passed: Iterable[str] = ()) -> None:
        """Check the types of what is given to a class, and fill in the rest but for what is passed to it."""
        types_of = hints(cls)
        for name, parameter in parameters_of(cls).items():
            inner = f"{key}.{name}"
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            if name in given:
                given[name] = self.value(types_of.get(name, Any), given[name], inner, parameter.default is None)
            elif parameter.default is not parameter.empty and name not in passed:
                with contextlib.suppress(TypeError, ValueError):  # a default that a config cannot hold
                    given[name] = json.loads(json.dumps(parameter.default))
        given |= {name: settled(item) for name, item in given.items()}
        in_order = {name: given[name] for name in [*parameters_of(cls), *given] if name in given}
        given.clear()
        given |= in_order

    def value(self, kind: Any, value: Any, key: str, nullable: bool = False) -> Any:
        """Check one value, and return it typed."""
        if isinstance(value, Raw):
            value = self.typed(kind, value, key)
        elif isinstance(value, dict):
            value = self.words(kind, value, key)
        if value is None and nullable:
            return None
        family = None if value is None else registry.family_at(key, value)
        if family is not None:
            return self.plugin(family, value, key)
        record = next((item for item in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(item)), None)
        if record is not None and isinstance(value, dict):
            self.group(typing.cast(type, record), value, key)
            return value
        before = len(self.problems)
        value = self.classes(kind, value, key)
        texts, value = settled(value, as_text=True), settled(value)
        if texts != value and not fits(kind, value) and fits(kind, texts):
            value = texts
        if len(self.problems) == before and not fits(kind, value):
            allowed, got = expected(kind), shown(value)
            either = " or ".join(filter(None, [", ".join(allowed[:-1]), allowed[-1]]))
            hint = nearest(got, allowed)
            self.report(key, f"expected {either}, got '{got}'{'.' if hint else ''}{hint}")
        return value

    def typed(self, kind: Any, text: Raw, key: str) -> Any:
        """Return a value of the command line as the type wants it."""
        value = text.value
        if key in registry.FAMILY_OF or named_class(kind, value) or fits(kind, value) or not fits(kind, str(text)):
            return value
        return str(text)

    def words(self, kind: Any, given: Tree, key: str) -> Tree:
        """Return a mapping with the words of the command line in it typed: ``--data.limit.train 100``."""
        mapping = next((item for item in (kind, *typing.get_args(kind)) if typing.get_origin(item) is dict), None)
        if mapping is None:
            return given
        inner = typing.get_args(mapping)[1]
        found = dict(given)
        for name, value in given.items():
            if isinstance(value, Raw):
                found[name] = self.typed(inner, value, f"{key}.{name}")
            elif isinstance(value, dict):
                found[name] = self.words(inner, value, f"{key}.{name}")
        return found

    def plugin(self, family: str, value: Any, key: str) -> Any:
        """Check the value of a plugin's key, in any of its forms; returns ``{class_path, init_args}``."""
        try:
            spec = registry.expand(family, value)
            why = refusal(spec["class_path"])
            if why:
                raise UserError(why)
            cls = registry.class_of(spec["class_path"], family)
        except UserError as error:
            self.problems += [Problem(key, item.text) for item in error.problems]
            return value
        given = dict(spec.get("init_args") or {})
        self.named(cls, given, key)
        return {"class_path": spec["class_path"], "init_args": given}

    def named(self, cls: type, given: Tree, key: str) -> None:
        """Check the arguments of a class that the config names."""
        wrong = registry.unknown_arguments(cls, given)
        for name, text in wrong.items():
            self.report(key, text, f"{key}.{name}")
        missing = registry.missing_arguments(functools.partial(cls, **{str(name): given[name] for name in given}))
        if missing and not wrong:
            self.report(key, f"{cls.__name__} needs {', '.join(missing)}")
        self.arguments(cls, given, key, registry.PASSED)

    def classes(self, kind: Any, value: Any, key: str) -> Any:
        """Check every class that is named in a value, at any depth, and its arguments."""
        if isinstance(value, Raw):
            return value
        if isinstance(value, list | tuple):
            return [self.classes(kind, item, key) for item in value]
        try:
            value = spelled_out(kind, value)
        except UserError as error:
            self.problems += [Problem(key, item.text) for item in error.problems]
            return value
        name = named_class(kind, value)
        if not name:
            if isinstance(value, dict):
                return {str(part): self.classes(kind, item, f"{key}.{part}") for part, item in value.items()}
            return value
        known = known_classes(kind)
        why = f"'{name[:100]}' would be read as a file: write the class here" if is_file(name) else ""
        if not why and "." in name:
            why = refusal(name)
        elif not why and name not in known and not (isinstance(value, str) and fits(kind, value)):
            allowed = f"a class path, or one of {', '.join(sorted(known))}" if known else "a class path"
            why = f"unknown class '{name}'.{nearest(name, known)} Allowed: {allowed}."
        if why:
            self.report(key, why)
            return value
        cls = known.get(name) or load(name)
        written = (value.get("init_args") or {}) if isinstance(value, dict) else {}
        if isinstance(cls, type) and isinstance(written, dict):
            given = dict(written)
            self.named(cls, given, key)
            if written:  # its defaults are left to the class
                return {**value, "init_args": {part: given[part] for part in written}}
        return value
