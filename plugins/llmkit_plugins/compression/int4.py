"""Weights as whole numbers of four bits, in groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.compression import Packed, PackingMethod
from llmkit.errors import UserError
from llmkit.ops.backend import multiplies_packed
from llmkit_plugins.compression.int8 import scales

GROUPS = (32, 64, 128, 256)
"""Sizes of groups for which torch has kernels."""


class Int4Matrix(Packed):
    """A matrix of whole numbers from -8 to 7, two in a byte, with a scale for each group of neighbours in a row."""

    def __init__(self, weight: Tensor, group: int) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns))
        self.group = min(group, columns + columns % 2)
        groups = -(-columns // self.group)
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", weight.new_empty(rows, groups * self.group // 2, dtype=torch.uint8))
        self.register_buffer("scale", weight.new_empty(rows, groups, dtype=torch.bfloat16))
        self.like: Tensor  # has the type of the model's numbers
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self._kernel: tuple[Tensor, Tensor] | None = None

    def take(self, weight: Tensor) -> None:
        """Round a matrix to the nearest numbers."""
        grouped = self.grouped(weight)
        self.scale.copy_(scales(grouped, 7)[..., 0])
        self.store((grouped / self.scale[..., None].to(weight.dtype)).round().clamp(-8, 7))

    def grouped(self, weight: Tensor) -> Tensor:
        """Return a matrix in its groups, (rows, groups, group); zeros fill up the last."""
        missing = self.scale.shape[1] * self.group - weight.shape[1]
        return F.pad(weight, (0, missing)).view(len(weight), -1, self.group)

    def store(self, numbers: Tensor) -> None:
        """Keep whole numbers, (rows, groups, group)."""
        self.codes.copy_(packed(numbers.flatten(1)))

    def forward(self) -> Tensor:
        """Return the matrix, each weight within half a scale of what was rounded."""
        return self._values(self.codes, self.scale)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of (..., columns)."""
        if self.group not in GROUPS or self.shape[1] % self.group or not multiplies_packed(x, self.shape):
            return super().linear(x, bias)
        if self._kernel is None:  # the weights have been loaded by now
            numbers = unpacked(self.codes).int() + 8
            scales_GR = self.scale.T.bfloat16()
            factors_GR2 = torch.stack([scales_GR, torch.zeros_like(scales_GR)], -1)
            self._kernel = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), factors_GR2
        codes, factors_GR2 = self._kernel
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), codes, self.group, factors_GR2)
        y = y.unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    def lookup(self, ids: Tensor) -> Tensor:
        """Return rows of the matrix."""
        return self._values(F.embedding(ids, self.codes), F.embedding(ids, self.scale))

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        numbers = unpacked(codes).view(*scale.shape, self.group)
        return (numbers * scale.float()[..., None]).to(self.like.dtype).flatten(-2)[..., : self.shape[1]]


def packed(numbers: Tensor) -> Tensor:
    """Return whole numbers from -8 to 7, (..., 2 n), as bytes, (..., n): the first of two is the lower half."""
    offset = (numbers.to(torch.int16) + 8).to(torch.uint8)
    return offset[..., 0::2] | offset[..., 1::2] << 4


def unpacked(codes: Tensor) -> Tensor:
    """Return what ``packed`` was given, as int8."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8


class Int4(PackingMethod):
    """Every matrix as four-bit numbers, with a scale (bfloat16) for each group of neighbouring weights of a row.

    About a seventh of the bytes: 4.5 bits a weight in groups of 32; ``int4:64`` has groups of 64. On a CPU it is
    slower: the matrix is made again whenever it is used. ``int4+bf16`` is faster where matrices are large and few
    tokens come at once, and holds its weights twice then.

    Args:
        group: weights that share a scale, an even number.
    """

    def __init__(self, group: int = 32) -> None:
        if group < 2 or group % 2:
            raise UserError(f"group must be even and at least 2, got {group}")
        self.group = group

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return the size of a group: ``:64``."""
        if text and not (text[0] == ":" and text[1:].isdecimal()):
            raise UserError(f"takes the size of its groups, as in int4:64, and got '{text}'")
        return {"group": int(text[1:])} if text else {}

    def form(self, weight: Tensor) -> Packed:
        """Return the empty form of a matrix."""
        return Int4Matrix(weight, self.group)
