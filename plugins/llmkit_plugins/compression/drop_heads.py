"""Heads of softmax attention removed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration
from llmkit.contracts import Position
from llmkit.errors import UserError
from llmkit_plugins.attention.differential import Differential
from llmkit_plugins.attention.softmax import GroupedQuery
from llmkit_plugins.compression.maps import Removal, fewest, is_plain, keep, of_model, positive, second_moments

ALL = slice(None)


class DropHeads(Removal):
    """The heads of each softmax attention that add the least to its output are removed.

    What a head adds is its columns of the output matrix times its values; its root mean square is measured on rows of
    the training data. Query heads that share keys and values go together. Michel et al. 2019 (arXiv:1905.10650) rank
    heads by the gradient of the loss instead. Files, memory, cache and time get smaller: rows are really gone.

    Args:
        share: share of the heads of each attention that is removed.
    """

    parts: ClassVar[str] = "heads"

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Remove heads; returns the number of key/value heads that are left, by attention."""
        assert rows is not None
        found = _attentions(model)
        if not found:
            raise UserError("there is no softmax attention with several heads and plain linear maps")
        moments = second_moments(model, rows)
        heads: dict[str, int] = {}
        for name, attention in found.items():
            width = attention.head_dim * attention.num_heads // attention.num_kv_heads
            weight, seen = attention.out.weight.double(), moments[f"{name}.out.weight"]
            own = [slice(start, start + width) for start in range(0, weight.shape[1], width)]
            added = [((weight[:, part] @ seen[part, part]) * weight[:, part]).sum() for part in own]
            kept = fewest(torch.stack(added), self.share)
            _keep(attention, kept)
            heads[name] = len(kept)
        return {"heads": heads}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Keep as many heads as are left."""
        found = _attentions(model)
        for name, count in of_model(made["heads"], {**found}).items():
            attention = found[name]
            kept = min(positive(count), attention.num_kv_heads)
            _keep(attention, torch.arange(kept, device=attention.out.weight.device))


def _attentions(model: nn.Module) -> dict[str, Any]:
    """Return the attentions with heads to remove. Raises UserError where scores have a bias by the number of a head."""
    positions = [module for module in model.modules() if isinstance(module, Position)]
    if any(type(position).bias is not Position.bias for position in positions):
        raise UserError("heads cannot be removed: the position encoding has a bias for each of them")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GroupedQuery)
        and not isinstance(module, Differential)
        and module.num_kv_heads > 1
        and all(is_plain(inner) for _, inner in module.named_children())
    }


def _keep(attention: GroupedQuery, groups: Tensor) -> None:
    """Remove all key/value heads but some, with the queries that look them up."""
    width, heads, shared = attention.head_dim, attention.num_heads, attention.num_kv_heads
    each = heads // shared
    queries = _channels(groups, each * width)
    keys = _channels(groups, width)
    values = keys + shared * width
    if attention.role == "cross":
        keep(attention.q, queries, ALL)
        keep(attention.kv, torch.cat([keys, values]), ALL)
        attention.kv.fused = {"weight": [len(keys)] * 2}  # type: ignore[assignment]
    else:
        keep(attention.qkv, torch.cat([queries, keys + heads * width, values + heads * width]), ALL)
        attention.qkv.fused = {"weight": [len(queries), len(keys), len(keys)]}  # type: ignore[assignment]
    keep(attention.out, ALL, queries)
    attention.num_heads, attention.num_kv_heads = each * len(groups), len(groups)
    attention.lookup.num_heads = attention.num_heads


def _channels(groups: Tensor, width: int) -> Tensor:
    """Return the channels of groups of a width, in order."""
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()
