"""What each token of a row contributes to the model's answer: integrated gradients, occlusion and gradients.

Integrated gradients: Sundararajan et al. 2017, arXiv:1703.01365; occlusion: Zeiler and Fergus 2013, arXiv:1311.2901;
both by captum (Kokhlikyan et al. 2020, arXiv:2009.07896).
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkit.analysis.explain.scored import ScoredRow
from llmkit.errors import UserError

TOLERANCE = 0.01
"""Share of the difference by which the attributions may miss it."""
STEPS, MOST_STEPS = 32, 256
AT_ONCE = 2**14
"""Positions that pass the network at once, and as few as one row of a long text."""


class Attribution(NamedTuple):
    """Contributions of the tokens, and how far they are from adding up."""

    values_P: Tensor
    """One number for each token of the row."""
    difference: float
    """The score of the row minus that of the baseline: what the contributions should add up to."""
    missed: float
    """By how much their sum misses it."""
    steps: int

    @property
    def complete(self) -> bool:
        """Whether the contributions add up, within ``TOLERANCE`` of the difference."""
        return self.missed <= TOLERANCE * abs(self.difference)


def captum() -> Any:
    """Return ``captum.attr``. Raises UserError when captum is not installed."""
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise UserError("attributions need the package captum: pip install 'llmkit[explain]'") from error


def _at_once(row: ScoredRow) -> int:
    return max(1, AT_ONCE // row.x_RTD[..., 0].numel())


def integrated_gradients(row: ScoredRow, layer: nn.Module | None = None, steps: int = STEPS) -> Attribution:
    """Return the integrated gradients of the score from the baseline to the row.

    The steps are doubled, up to ``MOST_STEPS``, until the contributions add up.

    Args:
        row: the row.
        layer: the layer whose output is attributed to; None: the embedding. Both ends of the path are then the states
            that the layer returns for the row and for the baseline, so that each layer explains the same difference.
        steps: points of the integral (Gauss-Legendre).

    Raises:
        UserError: captum is not installed.
    """
    method = captum().IntegratedGradients(lambda x_NRTD: row.score(x_NRTD, layer))
    if layer is None:
        end, start = row.x_RTD, row.baseline_RTD
    else:
        end, start = (row.states(layer, x_RTD) for x_RTD in (row.x_RTD, row.baseline_RTD))
    with torch.no_grad():
        high, low = row.score(torch.stack([end, start]), layer).tolist()
    while True:
        found = method.attribute(end[None], start[None], n_steps=steps, internal_batch_size=_at_once(row))
        values_P = found[0].sum(-1).flatten().float()
        result = Attribution(values_P, high - low, abs(float(values_P.sum()) - (high - low)), steps)
        if result.complete or steps >= MOST_STEPS:
            return result
        steps *= 2


def occlusion(row: ScoredRow) -> Tensor:
    """Return by how much the score falls when each token alone becomes the baseline, (P,).

    Raises UserError when captum is not installed.
    """
    rows, length, _ = row.x_RTD.shape
    features_P = torch.zeros(rows * length, dtype=torch.long)
    features_P[row.free] = torch.arange(1, len(row.free) + 1)  # 0: tokens that stay, all of them together
    method = captum().FeatureAblation(row.score)
    with torch.no_grad():
        found = method.attribute(
            row.x_RTD[None],
            row.baseline_RTD[None],
            feature_mask=features_P.reshape(1, rows, length, 1).to(row.x_RTD.device),
            perturbations_per_eval=_at_once(row),
        )
    values_P: Tensor = found[0, ..., 0].flatten().float()
    return values_P


def jacobian(row: ScoredRow, layer: nn.Module | None = None) -> Tensor:
    """Return the norm of the score's gradient with respect to the vector of each token, (P,).

    ``layer``: with respect to what this layer returns, in place of the embedding.
    """
    x_RTD = row.x_RTD if layer is None else row.states(layer, row.x_RTD)
    x_NRTD = x_RTD[None].requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(row.score(x_NRTD, layer).sum(), x_NRTD)
    norms_P: Tensor = gradient[0].norm(dim=-1).flatten().float()
    return norms_P
