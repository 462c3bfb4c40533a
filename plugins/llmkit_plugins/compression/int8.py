"""Weights as whole numbers of eight bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.compression import Packed, PackingMethod
from llmkit.ops.backend import multiplies_packed


class Int8Matrix(Packed):
    """A matrix of whole numbers from -127 to 127 with a scale for each row, its largest magnitude over 127."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns))
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", weight.new_empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scale", weight.new_empty(rows, 1))

    def take(self, weight: Tensor) -> None:
        """Round a matrix to the nearest numbers."""
        self.scale.copy_(scales(weight, 127))
        self.codes.copy_((weight / self.scale).round().clamp(-127, 127))

    def forward(self) -> Tensor:
        """Return the matrix, each weight within half a scale of the original."""
        return self.codes.to(self.scale.dtype) * self.scale

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of (..., columns); the scale comes after the product, which saves a pass over the matrix."""
        if multiplies_packed(x, self.shape):
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scale[:, 0].to(x.dtype))
            y = y.unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.codes.to(x.dtype)) * self.scale.T.to(x.dtype)
        return y if bias is None else y + bias

    def lookup(self, ids: Tensor) -> Tensor:
        """Return rows of the matrix."""
        return F.embedding(ids, self.codes).to(self.scale.dtype) * F.embedding(ids, self.scale)


def scales(weight: Tensor, largest: int) -> Tensor:
    """Return a scale for the last dimension, (..., 1), at which the largest magnitude becomes ``largest``."""
    scale = weight.abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, scale, 1.0)  # of zeros alone, any


class Int8(PackingMethod):
    """Every matrix as eight-bit numbers, with a scale for each output channel, symmetric around zero.

    A quarter of the bytes. On a CPU it is not faster: the matrix is made again whenever it is used. ``int8+bf16`` is
    faster where matrices are large and few tokens come at once.
    """

    def form(self, weight: Tensor) -> Packed:
        """Return the empty form of a matrix."""
        return Int8Matrix(weight)
