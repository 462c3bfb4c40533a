"""What a model would answer from the states of an earlier layer (the logit lens).

nostalgebraist 2020, "interpreting GPT: the logit lens". Here for any head: the states of a layer take the place of
those of the last one, then come the final norm and the head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkit.analysis.explain.capture import Recording
from llmkit.analysis.explain.scored import vocabulary_scores, watched
from llmkit.contracts import IGNORE, Batch
from llmkit.model.language_model import LanguageModel


class Guesses(NamedTuple):
    """What one layer would predict at each position."""

    ids_BTK: Tensor
    """The most probable tokens."""
    probabilities_BTK: Tensor
    target_BT: Tensor
    """The probability of the target; NaN where there is none."""


def last_stack(model: LanguageModel) -> list[nn.Module]:
    """Return the layers whose last one the head reads."""
    net = model.network
    return list(net.encoder if net.topology == "encoder" else net.decoder)


@torch.no_grad()
def states_by_layer(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """Return the residual stream, (B, T, D), before the first layer and after each of the stack that the head reads."""
    recording = Recording(model.network)
    model.head.loss(recording, batch)
    return recording.passes[-1].states


@torch.no_grad()
def losses_by_layer(model: LanguageModel, batch: Batch) -> list[float]:
    """Return the sum of the loss if the head read the states before the first layer, and after each layer.

    The last one is the model's own loss.
    """
    last, losses = last_stack(model)[-1], []
    for state_BTD in states_by_layer(model, batch):
        with watched(last, state_BTD):
            losses.append(float(model.head.loss(model.network, batch).total))
    return losses


@torch.no_grad()
def guesses_by_layer(model: LanguageModel, batch: Batch, most: int = 1) -> list[Guesses]:
    """Return the ``most`` probable tokens at each position by layer, for heads whose decoder predicts tokens."""
    net, targets_BT = model.network, batch["targets"]
    found = []
    for state_BTD in states_by_layer(model, batch):
        probabilities_BTV = vocabulary_scores(net, net.decoder_norm(state_BTD) * net.output_scale).float().softmax(-1)
        best = probabilities_BTV.topk(min(most, probabilities_BTV.shape[-1]))
        target_BT = probabilities_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
        target_BT = target_BT.masked_fill(targets_BT == IGNORE, torch.nan)
        found.append(Guesses(best.indices, best.values, target_BT))
    return found
