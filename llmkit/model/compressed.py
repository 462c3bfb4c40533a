"""Models that have been compressed: their structure, built again from what a checkpoint says about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from llmkit import registry
from llmkit.compression import Compression, expand
from llmkit.contracts import Head
from llmkit.errors import Problem, UserError, note

Chain = list[dict[str, Any]]
"""The methods that compressed a model, in order: ``method``, a plugin's spec, and what it ``made``, plain data."""


def rebuild(net: nn.Module, head: Head, chain: Chain) -> None:
    """Give an untrained model the structure of a compressed one, in place."""
    model = nn.ModuleDict({"net": net, "head": head})
    for step in chain:
        method_of(step).rebuild(model, copy.deepcopy(step["made"]))


def method_of(step: Mapping[str, Any]) -> Compression:
    """Return the method of a step of a chain. Raises UserError when it is not installed."""
    method: Compression = registry.factory_of(step["method"], "compression")()
    return method


def names(chain: Chain) -> str:
    """Return the methods of a chain as a person writes them: the names of their classes."""
    return ", ".join(str(step["method"]["class_path"]).rpartition(".")[2] for step in chain)


def check_trainable(chain: Chain, key: str, path: Any) -> None:
    """Raise UserError, with the key that names the checkpoint, for a compressed model that cannot be trained."""
    fixed = [step for step in chain if not method_of(step).trains]
    if fixed:
        text = f"{path} is compressed by {names(fixed)}, whose weights cannot be trained: name the checkpoint before"
        raise UserError(Problem(key, text))


def expanded(model: Any, where: str) -> None:
    """Put plain weights in the place of compressed ones, with a note. Raises UserError where there is no such form."""
    changed = [step for step in model.compression if not method_of(step).expands]
    if changed:
        raise UserError(f"{where} is compressed by {names(changed)}: what is left has no form that others know")
    expand(model.network)
    expand(model.head)
    model.float()
    note(f"{where} is compressed by {names(model.compression)}: the weights that it stands for are written out in full")
    model.compression = []
