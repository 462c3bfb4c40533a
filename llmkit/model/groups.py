"""A network's parameters by what an optimizer does with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_embedding(name: str) -> bool:
    """Return whether a parameter of the network is a table that is looked up."""
    return name.startswith(("embedding.", "position.", "token_types."))


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
    net: nn.Module, kinds: dict[str, str], maps: dict[str, list[int]] | None = None
) -> list[dict[str, Any]]:
    """Return optimizer groups by ``kind``: matrices and embeddings with weight decay, vectors without.

    Args:
        net: the module, possibly wrapped by FSDP since ``kinds`` was taken (its shards are flat).
        kinds: what ``parameter_kinds`` returned.
        maps: what ``fused_maps`` returned: the group ``matrix`` says the ``maps`` of each of its parameters.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": []}
    rows: list[list[int]] = []
    for full_name, parameter in net.named_parameters():
        if parameter.requires_grad:
            name = full_name.replace("_fsdp_wrapped_module.", "")
            groups[kinds[name]].append(parameter)
            if maps is not None and kinds[name] == "matrix":
                rows.append(maps.get(name, [len(parameter)]))
    own: dict[str, dict[str, Any]] = {"vector": {"weight_decay": 0.0}, "matrix": {"maps": rows} if rows else {}}
    return [{"params": group, "kind": kind, **own.get(kind, {})} for kind, group in groups.items() if group]
