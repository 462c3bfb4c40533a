"""Which weights of theirs are which of ours, usable in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.errors import UserError


@dataclass(frozen=True)
class Weight:
    """One weight of ours and where it is in theirs."""

    ours: str
    theirs: tuple[str, ...]
    """One name, or several whose rows lie one below the other in ours."""
    transposed: bool = False
    """Whether theirs is (in, out), as GPT-2's are."""
    skip: int = 0
    """Rows at the start of theirs that nothing uses."""
    row: bool = False
    """Whether theirs has a first dimension of one that ours does not have."""


def linear(ours: str, *theirs: str, bias: bool = True, transposed: bool = False) -> Iterator[Weight]:
    """Yield the weights of a linear map, or of several that are one of ours, or of a norm."""
    yield Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)
    if bias:
        yield Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))


def take(weights: Sequence[Weight], theirs: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return weights of ours in float32, and take theirs out of a mapping, each once.

    Raises UserError that lists those that are missing.
    """
    missing = [name for weight in weights for name in weight.theirs if name not in theirs]
    if missing:
        raise UserError(f"{where}: weights are missing: {listed(missing)}")
    found: dict[str, Tensor] = {}
    for weight in weights:
        parts = [theirs.pop(name) for name in weight.theirs]
        if not all(part.is_floating_point() and part.shape[1:] == parts[0].shape[1:] for part in parts):
            raise UserError(f"{where}: {', '.join(weight.theirs)} have shapes or types that do not fit each other")
        value = torch.cat([part.float() for part in parts]) if len(parts) > 1 else parts[0].float()
        if weight.transposed:
            if value.dim() != 2:
                raise UserError(
                    f"{where}: {weight.theirs[0]} should be a matrix, it has the shape {tuple(value.shape)}"
                )
            value = value.T
        if weight.row:
            if len(value) != 1 or value.dim() != 2:
                raise UserError(f"{where}: {weight.theirs[0]} should be one row, it has the shape {tuple(value.shape)}")
            value = value[0]
        found[weight.ours] = value[weight.skip :].contiguous()
    return found


def give(weights: Sequence[Weight], ours: Mapping[str, Tensor], sizes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Return weights of theirs: the inverse of ``take``.

    Args:
        weights: the mapping; each of ours in it is given.
        ours: our weights by name.
        sizes: by the name of ours, the rows of each of several of theirs; not named: equal ones.
    """
    found: dict[str, Tensor] = {}
    for weight in weights:
        value = ours[weight.ours][None] if weight.row else ours[weight.ours]
        if weight.skip:
            value = torch.cat([value.new_zeros(weight.skip, *value.shape[1:]), value])
        count = len(weight.theirs)
        rows = sizes.get(weight.ours.rpartition(".")[0], [len(value) // count] * count) if count > 1 else [len(value)]
        for name, part in zip(weight.theirs, value.split(rows), strict=True):
            found[name] = (part.T if weight.transposed else part).contiguous().clone()
    return found


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
