"""The one rule for which implementation of a function in ``llmkit.ops`` computes a call."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["plain", "cpu"]


def backend(x: Tensor) -> Backend:
    """Return ``cpu`` for training on a CPU in float32 or bfloat16, ``plain`` for everything else.

    Autograd's own CPU kernels make several passes over memory where one would do; a gradient written by hand saves
    them. Without a gradient there is nothing to save, and torch.compile fuses the plain form itself.
    """
    fast = (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_grad_enabled()
        and x.requires_grad
        and not torch.compiler.is_compiling()
    )
    return "cpu" if fast else "plain"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives to products on this tensor's device; None where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # not for the meta device
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off on this tensor's device, for what needs the precision of its inputs."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
