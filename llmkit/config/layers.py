"""A config is a stack of layers: default < checkpoint < files < command line, each value with its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llmkit import registry
from llmkit.check import Raw, settled
from llmkit.errors import Problem, UserError

Tree = dict[str, Any]

DEFAULT = "default"
COMMAND_LINE, OVERRIDES = "command line", "overrides"  # of a command, and of a call from Python

SPLITS = ("validation", "test", "predict")
READING = ("format", "pattern", "delimiter", "column_names", "columns", "encoding")
"""Keys of ``data`` that say how files are read."""


class Layer(NamedTuple):
    """One source of settings."""

    tree: Tree
    """Its groups (model, data, ...) are mappings."""
    source: str
    """The place of a value that has no place of its own: a file, a checkpoint, the command line."""
    places: Mapping[str, str] = {}
    """``plain`` key -> ``FILE:LINE``."""

    def at(self, key: str) -> str:
        """Return the place of the value of a key."""
        return self.places.get(key, self.source)


def plain(key: str) -> str:
    """Return a key as people write it: ``model.attention.init_args.num_heads`` is ``model.attention.num_heads``."""
    key = re.sub(r"\.(init_args|class_path)(?=\.|$)", "", key)
    above, _, last = key.rpartition(".")
    return above if last == "name" and above in (*registry.FAMILY_OF, *registry.DATASETS) else key


class Stack:
    """Layers on top of each other: one tree, in which plugins are ``{class_path, init_args}``, and its values' places.

    What is not right in a layer stays as it is: the check of the whole tree reports it.

    Args:
        layers: the lowest first.

    Attributes:
        tree: the merged settings.
        notes: what the user should know about what was left out.
    """

    def __init__(self, *layers: Layer) -> None:
        self.tree: Tree = {}
        self.notes: list[str] = []
        self._places: dict[str, str] = {}
        for layer in layers:
            below, self.tree = self.tree, self._merge(self.tree, layer.tree, "", layer)
            if "data" in layer.tree and "data" in below:
                same = [other.tree.get("data", {}) for other in layers if other.source == layer.source]
                self._leave_out_splits(below["data"], layer, {name.rstrip("+") for data in same for name in data})

    def _merge(self, below: Tree, above: Tree, key: str, layer: Layer) -> Tree:
        """Return a mapping with a layer's on top; a plugin of another class replaces the whole plugin."""
        merged = dict(below)
        for name, value in above.items():
            name, appends = name.removesuffix("+"), name.endswith("+")  # --trainer.callbacks+=NAME
            inner = f"{key}.{name}" if key else name
            old: Any = below.get(name)
            if isinstance(old, Raw) and isinstance(value, dict):  # --model.decoding '{...}', then .num_beams
                old = old.value
            if appends:
                value = [*_items(old), *_items(value)]
            family = registry.family_at(inner, value) or (isinstance(value, dict) and registry.family_at(inner, old))
            if family:
                value = _whole(family, value)
            if isinstance(value, dict) and type(old) is str and inner.startswith("trainer."):
                old, value = {"class_path": old}, {"init_args": value}  # --trainer.logger NAME, then .save_dir
            adds = isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value)
            if isinstance(old, dict) and not adds:
                if family and layer.source in (COMMAND_LINE, OVERRIDES):
                    self._note_replaced(inner, old, value)
                self._forget_below(inner)
            written = plain(inner)
            if not isinstance(value, dict) or not value:
                self._places[written] = layer.at(written)
                if isinstance(value, Raw) and isinstance(value.value, dict):  # a mapping, unless the key takes text
                    self._places |= {plain(f"{inner}.{name}"): layer.at(written) for name in value.value}
            elif written in layer.places and not family and name != "init_args":  # arguments do not choose a plugin
                self._places[written] = layer.places[written]
            merged[name] = self._merge(old if adds else {}, value, inner, layer) if isinstance(value, dict) else value
        return merged

    def _note_replaced(self, key: str, old: Tree, new: Any) -> None:
        """Note which arguments are dropped with a plugin."""
        if old.get("init_args"):
            dropped = ", ".join(f"{name}: {value}" for name, value in old["init_args"].items())
            cls = str(new.get("class_path") if isinstance(new, dict) else new).rpartition(".")[2]
            self.notes.append(f"{key} is {cls} now; {dropped} of {self.at(key)} no longer applies")

    def _leave_out_splits(self, below: Tree, layer: Layer, given: set[str]) -> None:
        """Where a layer trains on other data, leave out the other splits of the layers below, with a note.

        They belong to the data below: a figure measured on them would be read as one for the new data. How files are
        read stays as it is, and the note names it. Other splits of one ``data.source`` are not other data.

        Args:
            below: the data of the layers below.
            layer: the layer, already merged.
            given: the keys of data that it sets, or that other options of its command line do.
        """
        sets = [name for name in ("source", "train") if name in layer.tree["data"]]
        key = next((name for name in sets if _kind(self.tree["data"][name]) != _kind(below.get(name))), "")
        if not key or not (below.get("train") or below.get("source")) or (key == "train" and below.get("source")):
            return
        inherited = {name for name, value in below.items() if value is not None} - given

        def places(names: Iterable[str]) -> dict[str, str]:
            return {name: self.at(f"data.{name}") for name in names if name in inherited}

        dropped = places(["train", "subset", *SPLITS] if key == "source" else SPLITS)
        kept = places(name for name in READING if below.get(name) not in ("auto", "utf-8"))
        if self.of("data.tokenizer").startswith("checkpoint "):
            kept |= places(["tokenizer"])
        for name in dropped:
            self._forget_below(f"data.{name}")
            self.put(f"data.{name}", None, layer.source)
        text = f"data.{key} is another one now ({layer.source})."
        if dropped:
            text += f" Left out with the old one: {_with_places(dropped)}; set them too to keep them."
        if kept:
            text += f" Still in force: {_with_places(kept)}."
        if dropped or kept:
            self.notes.append(text)

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
        given = {name: place for name, place in self._places.items() if f"{name}.".startswith(f"{other}.")}
        self._places = {f"{key}{name.removeprefix(other)}": place for name, place in given.items()} | self._places

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


def _with_places(keys: Mapping[str, str]) -> str:
    return ", ".join(f"data.{name} ({place})" for name, place in keys.items())


def _kind(data: Any) -> Any:
    """Return what tells data apart: their files, or the class that generates them, whatever its arguments."""
    data = settled(data)
    return data.get("class_path", data) if isinstance(data, dict) else data


def _items(value: Any) -> list[Any]:
    """Return a list, or one value as a list, of a word of the command line too."""
    inner = value.value if isinstance(value, Raw) else value
    if isinstance(inner, list):
        return inner
    return [inner if isinstance(inner, dict) else value] if value else []


def _same_class(below: Tree, above: Tree) -> bool:
    """Return whether a mapping adds to another one: to a plugin of the same class, or to one whose class it leaves."""
    return "name" not in above and above.get("class_path", below.get("class_path")) == below.get("class_path")


def _whole(family: str, value: Any) -> Any:
    """Return a plugin as ``{class_path, init_args}``; a mapping without a name has arguments of the plugin below it."""
    if isinstance(value, dict) and not {"name", "class_path", "init_args"} & value.keys():
        return {"init_args": value}
    try:
        return registry.expand(family, value)
    except UserError:
        return value
