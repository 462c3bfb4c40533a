"""Whether a checkpoint's parts are of the right types, and agree with each other, before anything is built of them.

Each function returns what is wrong, or an empty string.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmkit.sequence import DecodingOptions

PLUGINS = ("head", "attention", "cross_attention", "position", "feedforward", "norm")
"""The arguments of a model that are plugins."""
CLASSES = (*PLUGINS, "optimizer", "scheduler")
SETTINGS: dict[str, type] = {
    **{"dim": int, "num_layers": int, "context": int, "dropout": float},
    **{"norm_first": bool, "tie_embeddings": bool, "compile": bool},
}
KINDS: dict[type, str] = {
    dict: "a dict", str: "a text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip
MOST = {"context": 2**24, "max_new_tokens": 2**20, "num_beams": 2**10}
"""Sizes that no weight has; larger ones are taken for damage."""


def wrong_types(part: Mapping[str, Any]) -> str:
    """Compare the types of llmkit's part of a checkpoint with those that llmkit writes."""
    kinds: dict[str, type] = {
        "model": dict,
        "tokenizer": dict,
        "tokenizer_state": str,
        "head_info": dict,
        "config": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(part[name], kind):
            return _not(f"its {name}", kind, part[name])
    spec = part["model"]
    for name, kind in SETTINGS.items():
        if not _is(spec.get(name), kind):
            return _not(f"model.{name}", kind, spec.get(name))
    classes = {**{f"model.{name}": spec.get(name) for name in CLASSES}, "its tokenizer": part["tokenizer"]}
    for name, value in classes.items():
        if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
            return f"{name} has no class_path"
        if not isinstance(value.get("init_args", {}), dict):
            return _not(f"{name}.init_args", dict, value["init_args"])
    decoding = spec.get("decoding")
    for field in dataclasses.fields(DecodingOptions) if isinstance(decoding, dict) else ():
        value = decoding.get(field.name, field.default)
        kind = float if field.type == "float" else int
        if not (_is(value, kind) or (value is None and "None" in str(field.type))):
            return _not(f"model.decoding.{field.name}", kind, value)
        if field.name in MOST and value is not None and value > MOST[field.name]:
            return f"model.decoding.{field.name} is {value}, more than {MOST[field.name]}"
    return ""


def wrong_sizes(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Compare the sizes of a model's description with those of its weights."""
    embedding = weights.get("net.embedding.weight")
    if embedding is None or embedding.dim() != 2 or spec["dim"] != embedding.shape[1]:
        shape = None if embedding is None else tuple(embedding.shape)
        return f"model.dim is {spec['dim']}, and the shape of its embedding {shape}"
    layers: dict[str, set[str]] = {}
    for name in weights:
        found = re.match(r"net\.(encoder|decoder)\.(\d+)\.", name)
        if found:
            layers.setdefault(found[1], set()).add(found[2])
    if not layers:
        return "it has no weights of layers"
    for side, numbers in layers.items():
        if spec["num_layers"] != len(numbers):
            return f"model.num_layers is {spec['num_layers']}, and its {side} has weights of {len(numbers)}"
    if spec["context"] > MOST["context"]:
        return f"model.context is {spec['context']}, more than {MOST['context']}"
    return ""


def wrong_paths(callbacks: Any) -> str:
    """Look for files outside of its folder among those that Lightning's ModelCheckpoint would delete."""
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict):
            continue
        best = state.get("best_k_models")
        paths = [
            state.get("last_model_path"),
            state.get("kth_best_model_path"),
            *(best if isinstance(best, dict) else ()),
        ]
        for path in map(str, paths):
            # ModelCheckpoint deletes what begins with its folder, and does not see a path that leaves it further on.
            if re.search(r"[^./\\][/\\]+\.\.([/\\]|$)", path):
                return f"a ModelCheckpoint in it names {path[:100]!r}, outside of its folder"
    return ""


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _not(name: str, kind: type, value: Any) -> str:
    return f"{name} should be {KINDS[kind]}, and is {reprlib.repr(value)}"
