"""A config is a stack of layers: default < checkpoint < files < command line, each value with its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llmkit import registry
from llmkit.check import settled
from llmkit.errors import Problem, UserError, note

Tree = dict[str, Any]

DEFAULT = "default"
COMMAND_LINE = "command line"

SPLITS = ("validation", "test", "predict")
READING = ("format", "pattern", "delimiter", "column_names", "columns", "encoding")
"""Keys of ``data`` that say how files are read."""


class Layer(NamedTuple):
    """One source of settings."""

    tree: Tree
    source: str
    """The place of a value that has no place of its own: a file, a checkpoint, the command line."""
    places: Mapping[str, str] = {}
    """Dotted key -> ``FILE:LINE``."""


def plain(key: str) -> str:
    """Return a key as people write it: ``model.attention.init_args.num_heads`` is ``model.attention.num_heads``."""
    key = re.sub(r"\.(init_args|class_path)(?=\.|$)", "", key)
    above, _, last = key.rpartition(".")
    return above if last == "name" and above in (*registry.FAMILY_OF, *registry.DATASETS) else key


class Stack:
    """The layers put on top of each other so far: one tree, and where each of its values came from."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self._places: dict[str, str] = {}

    def add(self, layer: Layer) -> None:
        """Put a layer on top; a plugin of another class replaces the whole plugin, with a note on what that drops."""
        tree = expanded(layer.tree, self.tree)
        self._leave_out_splits(tree.get("data"), layer.source)
        self.tree = self._merge(self.tree, tree, "", layer.source)
        leaves = set(_leaves(tree))
        self._places |= dict.fromkeys(leaves, layer.source)
        # A mapping that only changes arguments of a plugin does not choose it.
        plugins = registry.plugins_in(self.tree)
        chosen = {key: place for key, place in layer.places.items() if plain(key) in leaves or key not in plugins}
        self._places |= {plain(key): place for key, place in chosen.items()}

    def _merge(self, below: Tree, above: Tree, key: str, source: str) -> Tree:
        merged = dict(below)
        for name, value in above.items():
            if name.endswith("+"):  # --trainer.callbacks+=NAME
                name, old = name[:-1], settled(below.get(name[:-1]))
                more = getattr(value, "value", value)
                value = old if isinstance(old, list) else [old] if old else []
                value = value + more if isinstance(more, list) else [*value, more]
            inner, old = f"{key}.{name}" if key else str(name), below.get(name)
            if not key and isinstance(value, dict) and not isinstance(old, dict | None):
                continue  # a group must be a mapping: what is wrong below is reported, not replaced
            if isinstance(getattr(old, "value", old), str) and isinstance(value, dict) and inner.startswith("trainer."):
                old, value = {"class_path": str(old)}, {"init_args": value}  # --trainer.logger NAME, then .save_dir
            if isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value):
                merged[name] = self._merge(old, value, inner, source)
                continue
            if (
                source == COMMAND_LINE
                and registry.family_at(inner, value)
                and isinstance(old, dict)
                and old.get("init_args")
            ):
                dropped = ", ".join(f"{part}: {item}" for part, item in old["init_args"].items())
                cls = str(value.get("class_path") if isinstance(value, dict) else value).rpartition(".")[2]
                note(f"{inner} is {cls} now; {dropped} of {self.at(inner)} no longer applies")
            if isinstance(old, dict):
                self._forget_below(inner)
            merged[name] = value
        return merged

    def _leave_out_splits(self, above: Any, source: str) -> None:
        """Where a layer trains on other data, leave out the other splits of the layers below, with a note.

        They belong to the data below: a figure measured on them would be read as one for the new data. How files are
        read stays as it is, and the note names it. Other splits of one ``data.source`` are not other data.
        """
        below = self.tree.get("data")
        if not isinstance(above, dict) or not isinstance(below, dict):
            return
        key = next((key for key in ("source", "train") if key in above and _changes(below.get(key), above[key])), "")
        if not key or not (below.get("train") or below.get("source")) or (key == "train" and below.get("source")):
            return
        dropped = {}
        for name in (*(("train", "subset") if key == "source" else ()), *SPLITS):
            if below.get(name) is not None and name not in above and not self._is_from(source, f"data.{name}"):
                dropped[name] = self.at(f"data.{name}")
                self._forget_below(f"data.{name}")
                self.put(f"data.{name}", None, source)
        stays = [name for name in READING if below.get(name) not in (None, "auto", "utf-8") and name not in above]
        stays += ["tokenizer"] if self.of("data.tokenizer").startswith("checkpoint ") else []
        kept = {name: self.at(f"data.{name}") for name in stays if not self._is_from(source, f"data.{name}")}
        if dropped or kept:
            text = f"data.{key} is another one now ({source})."
            if dropped:
                text += f" Left out with the old one: {_with_places(dropped)}; set them too to keep them."
            if kept:
                text += f" Still in force: {_with_places(kept)}."
            note(text)

    def _is_from(self, source: str, key: str) -> bool:
        """Return whether a layer of this source set a value, or a part of it."""
        places = (place for name, place in self._places.items() if name == key or name.startswith(f"{key}."))
        return any(place == source or place.startswith(f"{source}:") for place in places)

    def _forget_below(self, key: str) -> None:
        self._places = {name: place for name, place in self._places.items() if not name.startswith(f"{plain(key)}.")}

    def put(self, key: str, value: Any, place: str) -> None:
        """Set one value and its place."""
        *groups, last = key.split(".")
        node = self.tree
        for name in groups:
            node = node.setdefault(name, {})
        node[last] = value
        self._places[key] = place

    def give_places(self, key: str, other: str) -> None:
        """Say of each value below ``key`` that has no place of its own that it is set where that of ``other`` is."""
        below = {name: place for name, place in self._places.items() if name == other or name.startswith(f"{other}.")}
        self._places = {f"{key}{name.removeprefix(other)}": place for name, place in below.items()} | self._places

    def of(self, key: str) -> str:
        """Return the place where this very value was set: an argument that was left out of a plugin is a default."""
        return self._places.get(plain(key), DEFAULT)

    def at(self, key: str) -> str:
        """Return where to look for a mistake in a value.

        That is the value's own place or that of the nearest key above it, but the group. Where that is a default and a
        part of the value was set, it is the place of that part.
        """
        key = plain(key)
        parts = (place for name, place in self._places.items() if name.startswith(f"{key}.") and place != DEFAULT)
        while key not in self._places and key.count(".") > 1:
            key = key.rpartition(".")[0]
        place = self._places.get(key, DEFAULT)
        return next(parts, place) if place == DEFAULT else place

    def placed(self, problem: Problem) -> str:
        """Return a problem as it is printed: its place, its key, its text."""
        key = problem.key
        if not problem.place_of and (key in registry.plugins_in(self.tree) or (key and "." not in key)):
            # The part is known to be wrong; its message may name the argument that the user set.
            named = (f"{key}.{word}" for word in re.findall(r"\w+", problem.text) if word not in ("name", "class_path"))
            key = next((name for name in named if self.of(name) != DEFAULT), key)
        place_of = problem.place_of or key
        text = str(problem._replace(key=key))
        return f"{self.at(place_of)}: {text}" if place_of else text


def _changes(old: Any, new: Any) -> bool:
    """Return whether a value of a higher layer is another one than that below it.

    Generated data stay those of their class, whatever its arguments.
    """
    new = getattr(new, "value", new)
    if isinstance(old, dict) and isinstance(new, dict) and "class_path" in old:
        return not _same_class(old, new)
    return bool(old != ({**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new))


def _with_places(keys: Mapping[str, str]) -> str:
    return ", ".join(f"data.{name} ({place})" for name, place in keys.items())


def _leaves(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values that are not mappings, as people write them."""
    for name, value in tree.items():
        key = f"{prefix}{str(name).removesuffix('+')}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield plain(key)


def _same_class(below: Tree, above: Tree) -> bool:
    """Return whether a mapping adds to another one: to a plugin of the same class, or to one whose class it leaves."""
    return "name" not in above and above.get("class_path", below.get("class_path")) == below.get("class_path")


def expanded(tree: Tree, below: Tree) -> Tree:
    """Return a layer's tree with every plugin as ``{class_path, init_args}``.

    A mapping that names no class sets arguments of the plugin in the layers ``below``. A value that is not right stays
    as it is: the check of the whole tree reports it.
    """
    tree = {str(name): dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    families = registry.plugins_in(below) | registry.plugins_in(tree)
    for key, family in families.items():
        group, _, name = key.partition(".")
        part = tree.get(group)
        value = part.get(name) if isinstance(part, dict) else None
        if value is None or (key in registry.DATASETS and not isinstance(value, dict)):
            continue
        if isinstance(value, dict) and not {"name", "class_path", "init_args"} & set(value):
            part[name] = {"init_args": value}  # type: ignore[index]
            continue
        try:
            part[name] = registry.expand(family, value)  # type: ignore[index]
        except UserError:
            continue
    return tree
