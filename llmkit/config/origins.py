"""Where every value of a config came from: ``FILE:LINE``, the command line, a checkpoint, or a default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

DEFAULT = "default"
COMMAND_LINE = "command line"


class Problem(NamedTuple):
    """A mistake in a config: the key that it is about, and the whole sentence for the user."""

    key: str
    text: str


def plain(key: str) -> str:
    """Return a key as people write it: ``model.attention.init_args.num_heads`` is ``model.attention.num_heads``."""
    return re.sub(r"\.(init_args|class_path)(?=\.|$)", "", key)


class Origins:
    """The places that the values of a config, or of one part of it, came from.

    A key is dotted. Both forms of a plugin are the same to it: ``init_args`` and ``class_path`` are left out of keys.

    Args:
        otherwise: the place of a value that has none of its own.
    """

    def __init__(self, otherwise: str = DEFAULT) -> None:
        self.otherwise = otherwise
        self._places: dict[str, str] = {}

    def of(self, key: str) -> str:
        """Return the place where this very value was set: an argument that was left out of a plugin is a default."""
        return self._places.get(plain(key), self.otherwise)

    def near(self, key: str) -> str | None:
        """Return where to look for a mistake in a value; None: nothing is known of it.

        It is the value's own place or that of the nearest key above it, but the group. Where that is a default, and a
        part of the value was set, it is the place of that part.
        """
        key = plain(key)
        parts = (place for name, place in self._places.items() if name.startswith(f"{key}.") and place != DEFAULT)
        while key not in self._places and key.count(".") > 1:
            key = key.rpartition(".")[0]
        place = self._places.get(key)
        return next(parts, place) if place == DEFAULT else place

    def at(self, key: str) -> str:
        """Return ``near``, or what stands for the whole part: the file, say, that a key is missing in."""
        return self.near(key) or self.otherwise

    def put(self, key: str, value: Any, place: str | None = None) -> None:
        """Record the place of a value, and of every value below it; without a place, the one of the whole part."""
        place = place or self.otherwise
        if key:
            self._places[plain(key)] = place
        if isinstance(value, Mapping):
            for name, item in value.items():
                self.put(f"{key}.{name}" if key else str(name), item, place)

    def update(self, above: Origins) -> None:
        """Put the places of a later part on top of these."""
        self._places |= above._places

    def keep(self, tree: Mapping[str, Any]) -> None:
        """Forget the places of values that are not in the whole config: a later part replaced what held them."""
        self._places = {key: place for key, place in self._places.items() if _holds(tree, key.split("."))}


def drop(tree: dict[str, Any], key: str) -> bool:
    """Take the value of a plain key out of a config; False: there is none. A whole group is never taken out."""
    if isinstance(tree.get(key), dict):
        return False
    node: Any = tree
    for name in (names := plain(key).split(".")):
        if isinstance(node, dict) and name not in node and isinstance(node.get("init_args"), dict):
            node = node["init_args"]
        if not isinstance(node, dict) or name not in node:
            return False
        holder, node = node, node[name]
    del holder[names[-1]]
    return True


def _holds(node: Any, names: list[str]) -> bool:
    if not names:
        return True
    if not isinstance(node, Mapping):
        return False
    if names[0] in node:
        return _holds(node[names[0]], names[1:])
    return "init_args" in node and _holds(node["init_args"], names)
