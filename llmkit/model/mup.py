"""Maximal update parametrization (muP): Yang et al. 2022, arXiv:2203.03466, for networks of any plugins.

Which sides of a matrix grow with the width is read off the same model at the base width, not off names. With r the
ratio of a matrix's inputs (its fan-in) to those at the base width, relative to what the standard parametrization does
at the base width:

- maps from the width to the width: initial values times 1 / sqrt(r), Adam's learning rate times 1 / r (table 8);
- maps from the width to a fixed number of outputs (classifiers): initial values and learning rate times 1 / r
  (table 3);
- the output matrix, tied or not: a multiplier of 1 / r instead, with the learning rate as it is (table 8);
- everything else (embeddings, positions, biases, norms) as it is;
- scores of the attention: 1 / E instead of 1 / sqrt(E), E the width of a head, with equal values at the base width.

The two treatments of outputs are the same to Adam (the paper's lemma J.1); the second one needs nothing of a head.
AdamW multiplies the weight decay by the learning rate, so that is scaled back: the decay of a step is the same at every
width. Muon's updates have a spectral norm of their own, hence no factor from the width to the width, and 1 / sqrt(r)
for a map to a fixed number of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from llmkit.contracts import Attention
from llmkit.errors import Problem, UserError
from llmkit.model.backbone import Backbone
from llmkit.model.optim import Muon


class Growth(NamedTuple):
    """By what the two sides of a matrix are larger than at the base width."""

    inputs: float
    outputs: float


def check(base_dim: int, optimizer: Any) -> None:
    """Raise UserError for a base width below one, or an optimizer that is neither AdamW, ours or torch's, nor Muon."""
    if base_dim < 1:
        raise UserError(Problem("model.mup_base_dim", f"must be at least 1, got {base_dim}"))
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.AdamW | Muon)):
        name = getattr(optimizer, "__name__", "this optimizer")
        text = f"has learning rates for adamw and muon, not for {name}: choose one of them, or leave mup_base_dim out"
        raise UserError(Problem("model.mup_base_dim", text))


def check_published(theirs: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Raise UserError when a published model would get the multipliers of muP, which its weights do not have."""
    then, now = (given.get("mup_base_dim") for given in (theirs, spec))
    if now not in (then, spec["dim"]):
        text = f"is {now}, but the model of init_from has {then}: its weights do not fit"
        raise UserError(Problem("model.mup_base_dim", text))


def growth(own: nn.Module, base: nn.Module) -> dict[str, Growth]:
    """Return the matrices whose inputs grow with the width, by name. The output matrix is not among them.

    Args:
        own: the network, the head, or both.
        base: the same at the base width.
    """
    left = {f"{name}.weight" for name, module in own.named_modules() if isinstance(module, nn.Embedding)}
    left |= {
        f"{name}.output.weight".lstrip(".") for name, module in own.named_modules() if isinstance(module, Backbone)
    }
    theirs = dict(base.named_parameters())
    found = {}
    for name, parameter in own.named_parameters():
        if parameter.dim() > 1 and name in theirs and name not in left:
            outputs, inputs = (parameter.shape[side] / theirs[name].shape[side] for side in (0, 1))
            if inputs != 1:
                found[name] = Growth(inputs, outputs)
    return found


def scale_initial(own: nn.Module, base: nn.Module) -> None:
    """Scale the initial values of linear maps, which have the same spread at every width.

    Other modules (recurrent ones) draw theirs by the width already.
    """
    for name, (inputs, outputs) in growth(own, base).items():
        module = own.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(1 / inputs if outputs == 1 else 1 / math.sqrt(inputs))


def parametrize(net: Backbone, base: Backbone) -> None:
    """Make a new network one of muP: its initial values, the output multiplier and the scale of its scores."""
    scale_initial(net, base)
    net.output_multiplier = base.embedding.embedding_dim / net.embedding.embedding_dim
    theirs = dict(base.named_modules())
    for name, module in net.named_modules():
        if isinstance(module, Attention) and hasattr(module, "scale") and hasattr(module, "head_dim"):
            other: Any = theirs[name]
            if module.head_dim != other.head_dim:
                scale = other.head_dim**-0.5 if other.scale is None else other.scale
                module.scale = scale * other.head_dim / module.head_dim


def lr_scales(grown: Mapping[str, Growth], kinds: Mapping[str, str], muon: bool) -> dict[str, float]:
    """Return what the learning rate of a parameter is multiplied by, where that is not 1.

    Args:
        grown: what ``growth`` returned.
        kinds: what ``parameter_kinds`` returned.
        muon: whether the optimizer orthogonalises the kind ``matrix``.
    """
    scales = {}
    for name, (inputs, outputs) in grown.items():
        if not (muon and kinds[name] == "matrix"):
            scales[name] = 1 / inputs
        elif outputs == 1:
            scales[name] = 1 / math.sqrt(inputs)
    return scales
