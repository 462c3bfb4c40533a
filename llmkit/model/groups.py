"""A network's parameters by what an optimizer does with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
    net: nn.Module,
    kinds: dict[str, str],
    maps: dict[str, list[int]] | None = None,
    layer_decay: float = 1.0,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups by ``kind``: matrices and embeddings with weight decay, vectors without.

    Args:
        net: the module, possibly wrapped by FSDP since ``kinds`` was taken (its shards are flat).
        kinds: what ``parameter_kinds`` returned.
        maps: what ``fused_maps`` returned: the group ``matrix`` says the ``maps`` of each of its parameters.
        layer_decay: what the learning rate of a layer is multiplied by, once for each step down from the head
            (Clark et al. 2020, arXiv:2003.10555); groups are then by depth too, and say their ``lr_scale``.
        lr_scales: what else the learning rates of some parameters are multiplied by, by name; their ``decay_scale``
            makes up for it in the decay of a step.
    """
    groups: dict[tuple[str, int, float], list[nn.Parameter]] = {}
    rows: dict[tuple[str, int, float], list[list[int]]] = {}
    top = 1 + max((layer_of(name) or 0 for name in kinds), default=0)
    for full_name, parameter in net.named_parameters():
        if parameter.requires_grad:
            name = full_name.replace("_fsdp_wrapped_module.", "")
            depth = layer_of(name) if layer_decay != 1 else None
            below = 0 if layer_decay == 1 else top - (top if depth is None else depth)
            key = kinds[name], below, (lr_scales or {}).get(name, 1.0)
            groups.setdefault(key, []).append(parameter)
            if maps is not None and kinds[name] == "matrix":
                rows.setdefault(key, []).append(maps.get(name, [len(parameter)]))
    order = ("matrix", "embedding", "vector")
    found = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]), *key[1:])):
        kind, below, scale = key
        group: dict[str, Any] = {"params": groups[key], "kind": kind}
        group |= {"weight_decay": 0.0} if kind == "vector" else {}
        group |= {"maps": rows[key]} if key in rows else {}
        group |= {} if layer_decay == 1 and scale == 1 else {"lr_scale": scale * layer_decay**below}
        found.append(group | ({} if scale == 1 else {"decay_scale": 1 / scale}))
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
        patterns: whole words of names between dots: ``embedding``, ``encoder.0``, ``head``, ``attention``, or with a
            range of layers, ``encoder.0-3``.

    Raises UserError for a pattern that no parameter fits.
    """
    parameters = {name.removeprefix("net."): parameter for name, parameter in net.named_parameters()}
    frozen = 0
    for pattern in patterns:
        names, missing = named(parameters, pattern)
        if missing is not None:
            parts = dict.fromkeys(re.sub(r"^((?:encoder|decoder)\.\d+|\w+).*", r"\1", name) for name in parameters)
            raise UserError(Problem("model.freeze", unknown("part", missing, parts)))
        for name in names:
            frozen += parameters[name].numel() * parameters[name].requires_grad
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(Problem("model.freeze", "leaves nothing to train"))
    return frozen


def named(names: Iterable[str], pattern: str) -> tuple[list[str], str | None]:
    """Return the names that have the words of a pattern in them, and the first part of it that none has.

    Args:
        names: words between dots.
        pattern: words between dots: ``encoder.0``, ``attention.out``; one may be a range, ``encoder.0-3.attention``.
    """
    layers = re.search(r"(?<=\.)(\d+)-(\d+)(?=\.|$)", pattern)
    numbers = range(int(layers[1]), int(layers[2]) + 1) if layers else ()
    roots = [f"{pattern[: layers.start()]}{i}{pattern[layers.end() :]}" for i in numbers] if layers else [pattern]
    found = {root: [name for name in names if f".{root}." in f".{name}."] for root in roots}
    return [name for part in found.values() for name in part], next((root for root in found if not found[root]), None)


def trained_share(net: nn.Module) -> str:
    """Return how many parameters are trained, of how many, in words."""
    counts = [(p.numel(), p.requires_grad) for p in net.parameters()]
    total, trained = sum(count for count, _ in counts), sum(count for count, trained in counts if trained)
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
