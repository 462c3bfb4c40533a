"""A model of Hugging Face as a layer of a config: the settings that its config.json stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.config.layers import Layer, Stack, plain
from llmkit.errors import Problem, located
from llmkit.hf.start import KEY, is_published, settings_of

OPEN = ("head", "context")
"""Keys that a config may set to something else than the model was published with."""


def layer_of(given: Stack) -> Layer | None:
    """Return the settings of the model that ``model.init_from`` names; None: it names none of Hugging Face.

    Raises UserError, with the place of the key, when the model cannot be taken.
    """
    model = given.tree.get("model", {})
    if not is_published(model.get("init_from")):
        return None
    head = model.get("head")
    if isinstance(head, Mapping) and not {"name", "class_path"} & head.keys():
        head = None  # arguments of the published one
    with located(given.at(KEY)):
        settings, where = settings_of(str(model["init_from"]), head)
    return Layer({"model": settings}, where)


def conflicts(stack: Stack, layer: Layer) -> Iterator[Problem]:
    """Yield each setting of a whole config that disagrees with the layer of a published model."""
    for name, value in Stack(layer).tree["model"].items():
        if name not in OPEN:
            yield from _differences(f"model.{name}", stack.tree["model"].get(name), value, layer.source)


def _differences(key: str, now: Any, published: Any, source: str) -> Iterator[Problem]:
    if isinstance(now, dict) and isinstance(published, dict) and now.get("class_path") == published.get("class_path"):
        for name, value in published.items():
            yield from _differences(f"{key}.{name}", now.get(name), value, source)
    elif now != published:
        yield Problem(plain(key), f"is {_shown(now)}, but {source} has {_shown(published)}")


def _shown(value: Any) -> str:
    """Return a value as a message has it: a plugin by its class."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return str(value)
