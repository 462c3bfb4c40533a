"""Linear maps as the product of two thin ones: a truncated singular value decomposition."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.compression import Calibration, Compression, Packed
from llmkit.errors import UserError
from llmkit_plugins.compression.maps import maps, of_model, percent, positive, second_moments

DAMPING = 1e-6
"""Part of their mean that is added to the second moments of the inputs: a direction that never occurs has some too."""


class Product(Packed):
    """A matrix (rows, columns) as the product of ``left``, (rows, rank), and ``right``, (rank, columns)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns))
        self.left = nn.Parameter(weight.new_empty(rows, rank))
        self.right = nn.Parameter(weight.new_empty(rank, columns))

    def take(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        """Take the first columns, values and rows of a decomposition, half of each value on either side."""
        rank = self.left.shape[1]
        root = values[:rank].sqrt()
        self.left.copy_(left[:, :rank] * root)
        self.right.copy_(root[:, None] * right[:rank])

    def forward(self) -> Tensor:
        """Return the matrix."""
        return self.left @ self.right

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of (..., columns) as two, which never makes the matrix."""
        return F.linear(F.linear(x, self.right), self.left, bias)


class SVD(Compression):
    """Each linear map as the product of two thin ones, by the singular value decomposition of its matrix.

    The closest matrix of a rank (Eckart and Young 1936, doi:10.1007/BF02288367). A map stays as it is where the two
    would have as many parameters as the one.

    Args:
        keep: share of the parameters of a map that its two parts have together, which decides their rank.
        error: if given, how far a map may be from the original, relative to its Frobenius norm: each map gets
            the lowest rank that stays below.
    """

    trains: ClassVar[bool] = True

    def __init__(self, keep: float = 0.5, error: float | None = None) -> None:
        for name, value in (("keep", keep), ("error", error)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{name} must be above 0 and below 1, got {value}")
        self.keep, self.error = keep, error

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return what ``50`` (percent of the parameters are kept) or ``@0.1`` (the largest error) stands for."""
        if text.startswith("@"):
            try:
                return {"error": float(text[1:])}
            except ValueError:
                raise UserError(f"takes the largest error after @, as in @0.1, got '{text[1:]}'") from None
        return {"keep": percent(text, "the percentage of parameters to keep")}

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Replace each map by two; returns the ranks by name."""
        moments = {} if rows is None else second_moments(model, rows)
        ranks: dict[str, int] = {}
        for matrix in maps(model):
            weight = matrix.weight.detach()
            parts = decomposed(weight, moments.get(matrix.name))
            rank = self._rank(parts[1], weight.shape)
            if 1 <= rank * sum(weight.shape) < weight.numel():
                ranks[matrix.name] = rank
                product = Product(weight, rank)
                product.take(*parts)
                matrix.replace(product)
        if not ranks:
            raise UserError("makes no linear map smaller: keep fewer parameters, or allow a larger error")
        return {"ranks": ranks}

    def _rank(self, values: Tensor, shape: torch.Size) -> int:
        """Return the rank of a map with these singular values."""
        if self.error is None:
            return math.floor(self.keep * shape[0] * shape[1] / sum(shape))
        beyond = values.square().flip(0).cumsum(0).flip(0)  # of each rank, the square of what is left out
        return int((beyond > self.error**2 * beyond[0]).sum())

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Put empty products in the place of the maps."""
        found = {matrix.name: matrix for matrix in maps(model)}
        for name, rank in of_model(made["ranks"], {**found}).items():
            shape = found[name].weight.shape
            found[name].replace(Product(found[name].weight, min(positive(rank), *shape)))


class WhitenedSVD(SVD):
    """``svd`` that keeps what matters for the inputs that a map reads, not for all directions alike.

    Wang et al. 2024 (SVD-LLM), arXiv:2403.07378: with S S^T the second moments of the inputs, the decomposition of W S,
    times the inverse of S, is the product of its rank that changes the outputs on these inputs the least. Maps that are
    not called as a module are decomposed without S; of a recurrence the inputs and the states are seen.

    Args:
        keep: share of the parameters of a map that its two parts have together, which decides their rank.
        error: if given, how far the outputs of a map may be from the original, relative to their root mean
            square on the rows: each map gets the lowest rank that stays below.
    """

    reads: ClassVar[bool] = True


def decomposed(weight: Tensor, moments_DD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the singular values and V^T, whose product is the matrix; largest values first, in double precision.

    With the second moments S S^T of the inputs they are those of W S, and V^T is multiplied by the inverse of S.
    """
    exact = weight.double()
    if moments_DD is None:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        return left, values, right
    damping = DAMPING * moments_DD.diagonal().mean().clamp(min=1e-30)
    root_DD = torch.linalg.cholesky(moments_DD + damping * torch.eye(len(moments_DD)).to(moments_DD))
    left, values, right = torch.linalg.svd(exact @ root_DD, full_matrices=False)
    return left, values, torch.linalg.solve_triangular(root_DD, right, upper=False, left=False)
