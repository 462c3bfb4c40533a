"""Networks for tests of decoding: small, random, and decided about what comes next."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.model.backbone import Backbone
from llmkit.registry import plugin


def decided(
    attention: str = "multi_head",
    topology: str = "decoder",
    *,
    vocab_size: int = 29,
    max_length: int = 64,
    position: str = "rotary",
    feedforward: str = "gelu",
    cross: str = "multi_head",
    **rest: Any,
) -> Backbone:
    """Return a network of two layers, 16 wide, in eval mode; further arguments are those of the attention variant."""
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=vocab_size,
        dim=16,
        num_layers=2,
        topology=topology,  # type: ignore[arg-type]
        max_length=max_length,
        attention=plugin("attention", attention, **rest),
        cross_attention=plugin("attention", cross),
        position=plugin("position", position),
        feedforward=plugin("feedforward", feedforward),
        norm=plugin("norm", "rms"),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8)  # an untrained network would be undecided everywhere
    return net.eval()
