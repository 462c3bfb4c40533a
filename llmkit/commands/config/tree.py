"""A config as the ``config`` commands print it: plugins by their short names, values as YAML on one line."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from llmkit import registry
from llmkit.config.plan import TOP_KEYS

Tree = dict[str, Any]


def short_names(family: str) -> dict[str, str]:
    """Return the short name of every class path of a family."""
    return {entry.class_path: name for name, entry in registry.entries(family).items()}


def shortened(tree: Tree) -> Tree:
    """Return a config with its keys in the order of the documentation and every plugin in its short form."""
    tree = {key: tree[key] for key in dict.fromkeys([*TOP_KEYS, *tree]) if key in tree}
    for key, family in registry.plugins_in(tree).items():
        group, _, leaf = key.partition(".")
        if isinstance(tree.get(group), dict) and leaf in tree[group]:
            tree[group] = {**tree[group], leaf: _short(tree[group][leaf], family)}
    return tree


def _short(spec: Any, family: str) -> Any:
    names = short_names(family)
    if not isinstance(spec, dict) or spec.get("class_path") not in names:
        return spec
    name, given = names[spec["class_path"]], spec.get("init_args") or {}
    if "name" in given:  # it would be taken for the plugin's
        return spec
    return {"name": name, **given} if given or family == "dataset" else name


def flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return every value by its dotted key, mappings flattened; the name of a plugin is the value of its key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{key}.")
        else:
            found[plugin_key(key)] = value
    return found


def plugin_key(key: str) -> str:
    """Return a key without the ``.name`` of a plugin's short form."""
    above, _, last = key.rpartition(".")
    return above if last == "name" and above in (*registry.FAMILY_OF, *registry.DATASETS) else key


def inline(value: Any) -> str:
    """Return a value as YAML on one line, which llmkit and any YAML parser read as the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if not isinstance(value, str):
        return str(yaml.safe_dump(value)).partition("\n")[0]
    plain = re.fullmatch(r"[A-Za-z_/.][\w/. -]*", value) and value == value.strip() and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)
