"""Four-bit weights whose rounding makes up for itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration, matrices
from llmkit.errors import UserError
from llmkit_plugins.compression.int4 import Int4, Int4Matrix
from llmkit_plugins.compression.int8 import scales
from llmkit_plugins.compression.maps import second_moments

DAMPING = 0.01
"""What is added to the diagonal of the inputs' second moments, as a share of its mean."""


class GPTQ(Int4):
    """Grouped four-bit weights that are rounded one column after the other, each time correcting the columns left.

    Frantar et al. 2022, arXiv:2210.17323, in the order of the columns and with the scale of a group taken when its turn
    comes. The inputs are those of the model before; in the paper they come through the layers that are rounded already.
    It needs a few hundred rows. Embeddings and maps that are not called are rounded as by ``int4``.

    Args:
        group: weights that share a scale, an even number.
    """

    reads: ClassVar[bool] = True

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Pack every matrix; returns the squared error of the maps' outputs as a share of that of plain rounding."""
        assert rows is not None
        moments = second_moments(model, rows)
        own = plain = 0.0
        for matrix in matrices(model):
            weight, form = matrix.weight.detach(), Int4Matrix(matrix.weight, self.group)
            form.take(weight)
            if (moments_II := moments.get(matrix.name)) is not None:
                plain += output_error(form() - weight, moments_II)
                round_columns(form, weight, moments_II)
                own += output_error(form() - weight, moments_II)
            matrix.replace(form)
        if not plain:
            raise UserError("no linear map has read anything: use int4")
        return {"error": own / plain, "note": f"error of the maps' outputs {own / plain:.0%} of that of plain rounding"}


def output_error(difference_OI: Tensor, moments_II: Tensor) -> float:
    """Return the mean squared error of a map's outputs, summed over these, given the second moments of its inputs."""
    difference_OI = difference_OI.double()
    return float((difference_OI @ moments_II * difference_OI).sum())


def round_columns(form: Int4Matrix, weight_OI: Tensor, moments_II: Tensor) -> None:
    """Give a form the weights as GPTQ rounds them.

    Args:
        form: gets numbers and scales.
        weight_OI: the matrix.
        moments_II: the second moments of what it reads.
    """
    left = form.grouped(weight_OI.double()).flatten(1)  # what is to be rounded, corrected on the way
    columns = weight_OI.shape[1]
    hessian = moments_II.clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    numbers = torch.zeros_like(left)
    for column in range(columns):
        group = column // form.group
        if column % form.group == 0:
            form.scale[:, group] = scales(left[:, column : column + form.group], 7)[:, 0].to(form.scale.dtype)
        scale = form.scale[:, group].double()
        numbers[:, column] = (left[:, column] / scale).round().clamp(-8, 7)
        error = (left[:, column] - numbers[:, column] * scale) / factor[column, column]
        left[:, column:columns] -= error[:, None] * factor[column, column:]
    form.store(numbers.unflatten(1, (-1, form.group)))
