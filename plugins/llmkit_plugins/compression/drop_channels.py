"""Hidden channels of the feedforward networks removed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration
from llmkit.contracts import Feedforward
from llmkit.errors import UserError
from llmkit_plugins.compression.maps import Removal, fewest, is_plain, keep, of_model, positive, second_moments

ALL = slice(None)


class DropChannels(Removal):
    """The hidden channels of each feedforward network that add the least to its output are removed.

    What a channel adds is its column of the output matrix times its value; its root mean square is measured on rows of
    the training data. For feedforward networks of two maps, ``inner`` and ``out``, gated or not. Files, memory and time
    get smaller: rows are really gone.

    Args:
        share: share of the channels of each network that is removed.
    """

    parts: ClassVar[str] = "channels"

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Remove channels; returns the number of those that are left, by network."""
        assert rows is not None
        networks = _networks(model)
        if not networks:
            raise UserError("there is no feedforward network with two plain linear maps, inner and out")
        moments = second_moments(model, rows)
        hidden: dict[str, int] = {}
        for name, network in networks.items():
            added = network.out.weight.double().square().sum(0) * moments[f"{name}.out.weight"].diagonal()
            kept = fewest(added, self.share)
            _keep(network, kept)
            hidden[name] = len(kept)
        return {"hidden": hidden}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Keep as many channels as are left."""
        found = _networks(model)
        for name, count in of_model(made["hidden"], {**found}).items():
            channels = min(positive(count), found[name].out.weight.shape[1])
            _keep(found[name], torch.arange(channels, device=found[name].out.weight.device))


def _networks(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Feedforward)
        and is_plain(getattr(module, "inner", None))
        and is_plain(getattr(module, "out", None))
    }


def _keep(network: Any, channels: Tensor) -> None:
    """Remove all channels but some; the rows of a gate come before those that it gates."""
    hidden = network.out.weight.shape[1]
    parts = network.inner.weight.shape[0] // hidden
    keep(network.inner, torch.cat([channels + hidden * part for part in range(parts)]), ALL)
    keep(network.out, ALL, channels)
    if hasattr(network.inner, "fused"):
        network.inner.fused = {"weight": [len(channels)] * parts}
