"""What a config, or a checkpoint's description of itself, may do: name classes, and decide where files are written.

Code runs when a class is imported, so a config may name only what is installed, or what the user lists in ``imports:``.
Nothing here imports a module to find out.
"""

from __future__ import annotations

import collections.abc
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import site
import sys
import sysconfig
import typing
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from llmkit import registry
from llmkit.config import files as config
from llmkit.config.origins import Origins, Problem
from llmkit.errors import UserError, note

PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""A dotted name, as in ``package.module.Class``."""

PLAIN = (
    *(str, int, float, complex, bool, bytes, type(None), list, tuple, set, dict, object),
    *(Path, PurePath, os.PathLike, datetime.timedelta, collections.abc.Iterable, collections.abc.Mapping),
)
"""Types whose values are no classes."""

PLAIN_NAMES = {*(kind.__name__ for kind in PLAIN), "None", "Any", "Union", "Optional", "List", "Dict", "Tuple"}

BESIDE = ("callbacks", "logger", "plugins", "profiler", "default_root_dir")
"""Keys of ``trainer`` that say what runs beside the training, or where files are written."""


def known(class_path: str) -> bool:
    """Return whether a config may name a class: one of an installed package, or of what the user imported."""
    top = class_path.partition(".")[0]
    return is_plugin(class_path) or (not _runs(class_path) and _installed(top))


def is_plugin(class_path: str) -> bool:
    """Return whether a checkpoint may name a class: one of a package with plugins, or of what the user imported."""
    plugins = {entry.class_path for family in registry.DEFAULTS for entry in registry.entries(family).values()}
    if class_path in plugins:  # registered by the user's own script, perhaps, which is ``__main__``
        return True
    tops = {name.partition(".")[0] for name in (*plugins, *config.imported)}
    ours = class_path.startswith(("llmkit.", "torch.optim."))
    return not _runs(class_path) and (ours or class_path.partition(".")[0] in tops)


def _runs(class_path: str) -> bool:
    """Return whether it is in a ``__main__`` module, which does its work when it is imported."""
    return any(part.startswith("__") for part in class_path.split("."))


@functools.cache
def _installed(top: str) -> bool:
    """Return whether a top-level module comes from an installed distribution. The standard library does not."""
    if not top.isidentifier() or top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or [spec.origin or ""]) if place]
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    roots = [Path(folder).resolve() for folder in folders]
    if places and not any(place.is_relative_to(root) for root in roots for place in places):
        roots = _editable(top)
    return bool(places) and all(any(place.is_relative_to(root) for root in roots) for place in places)


def _editable(top: str) -> list[Path]:
    """Return the folders of editable installs that bring a top-level module."""
    found = []
    for name in importlib.metadata.packages_distributions().get(top, []):
        told = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
        if told.get("dir_info", {}).get("editable"):
            found.append(Path(urllib.parse.unquote(urllib.parse.urlparse(told["url"]).path)).resolve())
    return found


def problems(tree: Mapping[str, Any], origins: Origins) -> list[Problem]:
    """Return one sentence for each class that a config names and may not. It imports none of them.

    Args:
        tree: a config, or a part of one; short names may be written out or not.
        origins: where its values came from, for the messages.
    """
    from llmkit.config.keys import GROUPS

    found: dict[str, Problem] = {}
    for group, cls in GROUPS.items():
        part = tree.get(group)
        for key, path in _classes_of(part, _hints(cls), group) if isinstance(part, Mapping) else ():
            if _is_file(path):
                text = f"'{path[:100]}' would be read as a file with a class in it: write the class here"
            elif _runs(path):
                text = f"{path[:200]}: modules whose names begin with '__' cannot be named"
            elif not known(path):
                text = (
                    f"{path[:200]}: module '{path.partition('.')[0]}' is neither installed nor listed in imports:. "
                    "A local file has to be named: --imports FILE.py, or 'imports:' in the config"
                )
            else:
                continue
            found.setdefault(key + path, Problem(key, f"{origins.at(key)}: {key}: {text}"))
    return list(found.values())


def stored_part(own: Mapping[str, Any], training: bool, alone: bool) -> dict[str, Any]:
    """Return what of a checkpoint's own config a command may start from, beside the model: data, seed, name, numbers.

    A checkpoint decides neither where files are written nor what else is built.

    Args:
        own: the config in the checkpoint.
        training: whether the command trains, and wants the trainer's settings.
        alone: whether no config is given beside the checkpoint, so that a note says what is left out.
    """
    parts = {name: own.get(name) for name in ("data", "trainer", "checkpoint")}
    data, trainer, saving = (part if isinstance(part, Mapping) else {} for part in parts.values())
    kept = {key: value for key, value in data.items() if key not in ("tokenizer", "cache_dir")}
    tree: dict[str, Any] = {"data": kept}
    if type(own.get("seed_everything")) in (int, bool):
        tree["seed_everything"] = own["seed_everything"]
    if is_below(own.get("name")):
        tree["name"] = own["name"]
    if training:
        tree["checkpoint"] = {key: value for key, value in saving.items() if _plain(value)}
        tree["trainer"] = {
            key: value
            for key, value in trainer.items()
            if isinstance(value, bool | None) or (key not in BESIDE and _plain(value))
        }
        left = [f"trainer.{key}" for key in trainer if key not in tree["trainer"]]
        if left and alone:
            note(f"a checkpoint alone does not bring {', '.join(left)}: give --config to have what it was trained with")
    return tree


def is_below(path: Any) -> bool:
    """Return whether a path stays below the folder that it is put in."""
    return (
        isinstance(path, str)
        and bool(Path(path).parts)
        and not Path(path).is_absolute()
        and not {"..", "~"} & set(Path(path).parts)
    )


def _plain(value: Any) -> bool:
    """Return whether a setting is a number, a switch or a plain word, or some of them."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return not isinstance(value, str) or not ("." in value or _is_file(value))


def _classes_of(arguments: Mapping[Any, Any], hints: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of everything among the arguments that is taken for a class, or a file with one."""
    for name, value in arguments.items():
        name = str(name)
        yield from _classes_in(value, hints.get(name.rstrip("+")), f"{key}.{name}")


def _classes_in(value: Any, hint: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        dotted = PATH.fullmatch(value) is not None
        if hint is None:  # an argument of unknown type
            taken = dotted and _found(value.partition(".")[0])
        else:
            taken = _takes_class(hint) and (dotted or _is_file(value))
        if taken:
            yield key, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _classes_in(item, hint, key)
    elif isinstance(value, Mapping):
        named = value.get("name") if hint is not None and _takes_class(hint) else None
        path = value.get("class_path", named)
        if path is None:
            for name, item in value.items():
                yield from _classes_in(item, hint, f"{key}.{name}")
            return
        path = str(path)
        if "class_path" in value or "." in path:
            yield key, path
        given = value.get("init_args")
        rest = {name: item for name, item in value.items() if name not in ("class_path", "name", "init_args")}
        yield from _classes_of({**rest, **(given if isinstance(given, Mapping) else {})}, _hints_at(key, path), key)


def _found(top: str) -> bool:
    """Return whether a top-level module can be imported."""
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _hints_at(key: str, path: str) -> dict[str, Any]:
    """Return the types of a class's arguments; none where the class is not known, or may not be imported."""
    try:
        if "." not in path and key in config.PLUGIN_KEYS:
            path = registry.find(config.PLUGIN_KEYS[key], path).class_path
        if "." not in path or not known(path):
            return {}
        return _hints(registry.Entry(key, path, ":".join(path.rsplit(".", 1)), "").find())
    except UserError:
        return {}  # said elsewhere


def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of a class's arguments; as text where a type's name cannot be looked up."""
    hints: dict[str, Any] = {}
    for base in reversed(getattr(cls, "__mro__", [cls])):
        try:
            hints |= typing.get_type_hints(base.__init__)
        except (NameError, TypeError, AttributeError):
            hints |= getattr(base.__init__, "__annotations__", {})
    return hints


def _takes_class(hint: Any) -> bool:
    """Return whether a value of this type may be given as the path of a class or a function."""
    if isinstance(hint, str):
        return not {word.rpartition(".")[2] for word in re.findall(r"[\w.]+", hint)} <= PLAIN_NAMES
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return False
    if origin in (collections.abc.Callable, type) or hint in (collections.abc.Callable, type):
        return True
    if typing.get_args(hint):
        return any(_takes_class(item) for item in typing.get_args(hint))
    return isinstance(hint, type) and hint not in PLAIN
