"""A model of Hugging Face as a layer of a config: the settings that its config.json stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmkit import registry
from llmkit.config.layers import Layer, Stack, expanded
from llmkit.errors import Problem, UserError
from llmkit.hf.start import KEY, is_published, settings_of

OPEN = ("head", "context")
"""Keys that a config may set to something else than the model was published with."""


def layer_of(layers: Sequence[Layer]) -> Layer | None:
    """Return the settings of the model that ``model.init_from`` names; None: it names none of Hugging Face.

    Raises UserError, with the place of the key, when the model cannot be taken.
    """
    init_from, place, head = None, "", None
    for layer in layers:
        model = layer.tree.get("model")
        if not isinstance(model, Mapping):
            continue
        if "init_from" in model:
            init_from, place = model["init_from"], layer.places.get(KEY, layer.source)
        asked = model.get("head")
        if asked is not None and not (isinstance(asked, Mapping) and not {"name", "class_path"} & asked.keys()):
            head = str(asked) if isinstance(asked, str) else asked
    if not is_published(init_from):
        return None
    try:
        settings, where = settings_of(str(init_from), head)
    except UserError as error:
        raise UserError(*(f"{place}: {problem}" for problem in error.problems)) from error
    return Layer({"model": settings}, where)


def conflicts(stack: Stack, layer: Layer) -> Iterator[Problem]:
    """Yield each setting of a whole config that disagrees with the layer of a published model."""
    for name, value in expanded(layer.tree, {})["model"].items():
        if name not in OPEN:
            yield from _differences(f"model.{name}", stack.tree["model"].get(name), value, layer.source)


def _differences(key: str, now: Any, published: Any, source: str) -> Iterator[Problem]:
    if key in registry.FAMILY_OF:
        if not isinstance(now, Mapping):
            yield Problem(key, f"is {now}, but {source} has {_class(published)}")
        elif now["class_path"] != published["class_path"]:
            yield Problem(key, f"is {_class(now)}, but {source} has {_class(published)}")
        else:
            for name, value in (published.get("init_args") or {}).items():
                yield from _differences(f"{key}.{name}", now["init_args"].get(name), value, source)
    elif now != published:
        yield Problem(key, f"is {now}, but {source} has {published}")


def _class(spec: Mapping[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]
