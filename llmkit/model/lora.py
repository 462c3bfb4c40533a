"""Puts adapters (LoRA) on the linear maps of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from llmkit.contracts import Attention
from llmkit.errors import Problem, UserError, unknown
from llmkit.model.backbone import Backbone, Layer
from llmkit.model.groups import named
from llmkit.model.initial import Draws
from llmkit.ops.lora import LoRA, LoRALinear


def adapt(net: Backbone, settings: Mapping[str, Any] | None, draws: Draws) -> Backbone:
    """Put adapters on maps of a network, which are all that is trained of it; returns the network.

    A begins with the spread of the paper's implementation, normally distributed, B at zero.

    Args:
        net: the network, which is changed.
        settings: which maps, and the size of the adapters, as a ``LoRA``; None: it stays as it is.
        draws: where random numbers come from.

    Raises UserError for a target that is not a linear map of a layer.
    """
    if settings is None:
        return net
    lora = LoRA(**settings)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, Layer)}
    maps = {
        f"{name}.{inner}": module
        for name, layer in layers.items()
        for inner, module in layer.named_modules()
        if type(module) is nn.Linear
    }
    if lora.targets is None:
        mixing = [f"{name}." for name, module in net.named_modules() if isinstance(module, Attention)]
        chosen = [name for name in maps if name.startswith(tuple(mixing))]
        if not chosen:
            text = f"must be set: this attention has no linear map; these are there: {_listed(maps)}"
            raise UserError(Problem("model.lora.targets", text))
    else:
        found = [named(maps, pattern) for pattern in lora.targets]
        if missing := [root for _, root in found if root is not None]:
            allowed = dict.fromkeys(part for name in maps for part in _parts(name))
            raise UserError(Problem("model.lora.targets", unknown("linear map", missing[0], allowed)))
        chosen = [name for name in maps if any(name in names for names, _ in found)]
        if not chosen:
            raise UserError(Problem("model.lora.targets", f"is empty; these are there: {_listed(maps)}"))
    net.requires_grad_(False)
    for name in chosen:
        module = LoRALinear(maps[name], lora)
        for index, a in enumerate(module.lora_a):
            with draws.named(f"{name}.lora_a.{index}"):
                nn.init.normal_(a, std=1 / math.sqrt(3 * module.in_features))
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, module)
    return net


def _parts(name: str) -> list[str]:
    """Return what a map can be called: its last word, the part of the layer it is in, both, and the layer."""
    stack, number, *inner = name.split(".")
    return [inner[0], inner[-1], f"{inner[0]}.{inner[-1]}", f"{stack}.{number}"]


def _listed(maps: dict[str, nn.Linear]) -> str:
    return ", ".join(dict.fromkeys(".".join(name.split(".")[2:]) for name in maps))
