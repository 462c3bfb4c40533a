"""Distillation: a student learns from a teacher's probabilities as well as from the data.

Hinton, Vinyals and Dean 2015, arXiv:1503.02531. With the student's scores z, the teacher's t and a temperature T, the
loss of a row is ``weight * T^2 * KL(softmax(t / T) || softmax(z / T)) + (1 - weight) * cross-entropy(z, target)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.contracts import Batch, Loss, Network
from llmkit.errors import Problem, UserError


@dataclass
class Distillation:
    """Which model a student learns from, and how much.

    Attributes:
        teacher: a checkpoint, a run folder (its best checkpoint), or a model of Hugging Face. It has the student's head
            and tokenizer; its parts and sizes may be others.
        temperature: divides the scores of both before their probabilities are compared.
        weight: share of the teacher's term in the loss; the rest is the head's own loss.
        sha256: hash of the teacher's weights, which a run fills in for its checkpoints; a run that resumes with another
            teacher is refused.
    """

    teacher: str = ""
    temperature: float = 2.0
    weight: float = 0.5
    sha256: str | None = None

    def __post_init__(self) -> None:
        self.temperature, self.weight = float(self.temperature), float(self.weight)

    def check(self) -> None:
        """Raise UserError for a value out of range, or without a teacher."""
        if not self.teacher:
            raise UserError(Problem("model.distill.teacher", "must be set: the checkpoint or run folder to learn from"))
        if not 0 < self.temperature < math.inf:
            raise UserError(Problem("model.distill.temperature", f"must be above 0, got {self.temperature}"))
        if not 0 <= self.weight <= 1:
            raise UserError(Problem("model.distill.weight", f"must be between 0 and 1, got {self.weight}"))


class Logits(NamedTuple):
    """Scores that are not multiplied out, ``hidden @ weight.T + bias``: (N, V)."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None


class SoftTargets(NamedTuple):
    """The scores of a teacher for the rows of a batch, and how they enter the loss."""

    logits: Logits
    temperature: float
    weight: float


@runtime_checkable
class Distillable(Protocol):
    """A head whose loss takes soft targets."""

    def logits(self, net: Network, batch: Batch, /) -> Logits:
        """Return the scores that the loss is computed from."""

    def loss(self, net: Network, batch: Batch, /, soft: SoftTargets | None = None) -> Loss:
        """Return the training loss of a batch, with a teacher's scores of the same rows if there are any."""


def distilled(total: Tensor, scores_NV: Tensor, soft: SoftTargets) -> Tensor:
    """Return a summed loss of scores, (N, V), mixed with their distance from a teacher's: the definition.

    Args:
        total: the loss without a teacher, summed over the rows.
        scores_NV: the student's scores, of rows that all count.
        soft: the teacher's scores of the same rows.
    """
    exact = torch.promote_types(scores_NV.dtype, torch.float32)
    theirs_NV = F.linear(*soft.logits)
    own, theirs = ((scores.to(exact) / soft.temperature).log_softmax(-1) for scores in (scores_NV, theirs_NV))
    divergence = F.kl_div(own, theirs, reduction="sum", log_target=True)
    return soft.weight * soft.temperature**2 * divergence + (1 - soft.weight) * total
