"""Low-rank adapters of linear maps: LoRA, Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import Problem, UserError
from llmkit.ops.elementwise import Dropout


@dataclass
class LoRA:
    """Which linear maps are trained through adapters, and how large these are.

    Attributes:
        rank: rows of A and columns of B of each adapter.
        alpha: what an adapter adds is multiplied by ``alpha / rank``.
        targets: the linear maps of the layers that get an adapter, by whole words of their names: ``attention``,
            ``attention.out``, ``feedforward``, ``encoder.0-3``; None: those of the attention.
        dropout: dropout of what an adapter reads.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.alpha, self.dropout = float(self.alpha), float(self.dropout)

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        allowed = {
            "rank": (self.rank >= 1, "at least 1"),
            "alpha": (0 < self.alpha < math.inf, "above 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
        }
        for name, (is_right, text) in allowed.items():
            if not is_right:
                raise UserError(Problem(f"model.lora.{name}", f"must be {text}, got {getattr(self, name)}"))

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank


class LoRALinear(nn.Linear):
    """A linear map W that is not trained, with W x + scale * B A x as its output.

    Maps that are fused in one weight have an adapter each. B begins at zero, so that nothing changes at first.

    Args:
        linear: the map; its weight and bias are taken over.
        lora: the size of the adapters.
    """

    def __init__(self, linear: nn.Linear, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.sizes: list[int] = getattr(linear, "fused", {}).get("weight", [linear.out_features])
        new = linear.weight.new_zeros
        self.lora_a = nn.ParameterList(nn.Parameter(new(lora.rank, linear.in_features)) for _ in self.sizes)
        self.lora_b = nn.ParameterList(nn.Parameter(new(rows, lora.rank)) for rows in self.sizes)
        self.scale, self.dropout = lora.scale, Dropout(lora.dropout)

    def forward(self, input: Tensor) -> Tensor:
        """Return the map of (..., in_features), with what the adapters add."""
        read = self.dropout(input)
        added = [F.linear(F.linear(read, a), b) for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        return F.linear(input, self.weight, self.bias) + self.scale * torch.cat(added, -1)


def whole_weight(linear: nn.Linear) -> Tensor:
    """Return the matrix of a linear map, (out, in), with what its adapters add: for code that reads the weight."""
    if not isinstance(linear, LoRALinear):
        return linear.weight
    pairs = zip(linear.lora_a, linear.lora_b, strict=True)
    return linear.weight + linear.scale * torch.cat([b @ a for a, b in pairs])


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights of a model with its adapters added to the matrices that they adapt.

    Raises ValueError when an adapter does not fit its matrix, which is checked before memory is taken.
    """
    found = {name: value for name, value in state.items() if not re.search(r"\.lora_[ab]\.\d+$", name)}
    for first in [name for name in state if name.endswith(".lora_a.0")]:
        root = first.removesuffix(".lora_a.0")
        pairs: list[tuple[Tensor, Tensor]] = []
        while (a := state.get(f"{root}.lora_a.{len(pairs)}")) is not None:
            pairs.append((a, state[f"{root}.lora_b.{len(pairs)}"]))
        weight = found[f"{root}.weight"]
        flat = any(value.dim() != 2 for pair in pairs for value in pair)
        if flat or weight.shape != (sum(len(b) for _, b in pairs), pairs[0][0].shape[1]):
            raise ValueError(f"the adapters of {root} do not fit its weight of the shape {tuple(weight.shape)}")
        found[f"{root}.weight"] = weight + scale * torch.cat([b @ a for a, b in pairs])
    return found
