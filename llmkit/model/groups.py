"""A network's parameters by what an optimizer does with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmkit.errors import Problem, UserError, unknown


def is_embedding(name: str) -> bool:
    """Return whether a parameter of the network is a table that is looked up."""
    return name.startswith(("embedding.", "position.", "decoder_position.", "token_types."))


def parameter_kinds(net: nn.Module, hidden: bool = False) -> dict[str, str]:
    """Return the kind of each parameter by name: ``matrix``, ``embedding`` (output matrix too) or ``vector``.

    Args:
        net: the network, or the model around it.
        hidden: whether only hidden matrices are of the kind ``matrix``: a head's count as output matrices.
    """

    def kind(name: str, parameter: Tensor) -> str:
        if parameter.dim() < 2:
            return "vector"
        if hidden and name.startswith("head."):
            return "embedding"
        return "embedding" if is_embedding(name) or name.startswith("output.") else "matrix"

    return {name: kind(name.removeprefix("net."), parameter) for name, parameter in net.named_parameters()}


def fused_maps(net: nn.Module) -> dict[str, list[int]]:
    """Return, by name, the weights that ``llmkit.ops.fused.fused`` marked, with the rows of each map in them."""
    return {
        f"{module}.{name}".removeprefix("."): sizes
        for module, part in net.named_modules()
        for name, sizes in getattr(part, "fused", {}).items()
    }


def parameter_groups(
    net: nn.Module, kinds: dict[str, str], maps: dict[str, list[int]] | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return optimizer groups by ``kind``: matrices and embeddings with weight decay, vectors without.

    Args:
        net: the module, possibly wrapped by FSDP since ``kinds`` was taken (its shards are flat).
        kinds: what ``parameter_kinds`` returned.
        maps: what ``fused_maps`` returned: the group ``matrix`` says the ``maps`` of each of its parameters.
        layer_decay: what the learning rate of a layer is multiplied by, once for each step down from the head
            (Clark et al. 2020, arXiv:2003.10555); groups are then by depth too, and say their ``lr_scale``.
    """
    groups: dict[tuple[str, int], list[nn.Parameter]] = {}
    rows: dict[tuple[str, int], list[list[int]]] = {}
    top = 1 + max((layer_of(name) or 0 for name in kinds), default=0)
    for full_name, parameter in net.named_parameters():
        if parameter.requires_grad:
            name = full_name.replace("_fsdp_wrapped_module.", "")
            depth = layer_of(name) if layer_decay != 1 else None
            key = kinds[name], 0 if layer_decay == 1 else top - (top if depth is None else depth)
            groups.setdefault(key, []).append(parameter)
            if maps is not None and kinds[name] == "matrix":
                rows.setdefault(key, []).append(maps.get(name, [len(parameter)]))
    order = ("matrix", "embedding", "vector")
    found = []
    for kind, below in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        group: dict[str, Any] = {"params": groups[kind, below], "kind": kind}
        group |= {"weight_decay": 0.0} if kind == "vector" else {}
        group |= {"maps": rows[kind, below]} if (kind, below) in rows else {}
        found.append(group | ({} if layer_decay == 1 else {"lr_scale": layer_decay**below}))
    return found


def layer_of(name: str) -> int | None:
    """Return how far up a parameter is: 0 below the layers, 1 in the first one; None: above them, in the head, say."""
    name = name.removeprefix("net.")
    if is_embedding(name) or name.startswith(("embedding_norm.", "decoder_embedding_norm.")):
        return 0
    layer = re.match(r"(?:encoder|decoder)\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer else None


def freeze(net: nn.Module, patterns: Sequence[str]) -> int:
    """Keep parameters as they are; returns their number.

    Args:
        net: the network, or the model around it.
        patterns: beginnings of names, whole words between dots: ``embedding``, ``encoder.0``, ``head``, or with a range
            of layers, ``encoder.0-3``.

    Raises UserError for a pattern that no parameter fits.
    """
    named = {name.removeprefix("net."): parameter for name, parameter in net.named_parameters()}
    frozen = 0
    for pattern in patterns:
        layers = re.fullmatch(r"(\w+)\.(\d+)-(\d+)", pattern)
        roots = [f"{layers[1]}.{i}" for i in range(int(layers[2]), int(layers[3]) + 1)] if layers else [pattern]
        for root in roots:
            fitting = [parameter for name, parameter in named.items() if f"{name}.".startswith(f"{root}.")]
            if not fitting:
                parts = dict.fromkeys(re.sub(r"^((?:encoder|decoder)\.\d+|\w+).*", r"\1", name) for name in named)
                raise UserError(Problem("model.freeze", unknown("part", root, parts)))
            for parameter in fitting:
                frozen += parameter.numel() * parameter.requires_grad
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(Problem("model.freeze", "leaves nothing to train"))
    return frozen
