"""The one rule for which implementation of a function in ``llmkit.ops`` computes a call."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from llmkit.errors import note

Backend = Literal["plain", "cpu", "triton"]


def backend(x: Tensor, triton: bool = False) -> Backend:
    """Return which implementation to take for a tensor, ``plain`` unless one of the others pays.

    - ``cpu``: training on a CPU in float32 or bfloat16. Autograd's own CPU kernels make several passes over memory
      where one would do; a gradient written by hand saves them. Without a gradient there is nothing to save.
    - ``triton``: on a GPU whatever Triton compiles there, in float32, bfloat16 or float16.

    Code that torch.compile compiles is always plain: it fuses that form itself.

    Args:
        x: the tensor that the function reads.
        triton: whether the function has a Triton kernel.
    """
    if torch.compiler.is_compiling():
        return "plain"
    if x.device.type == "cpu":
        fast = x.dtype in (torch.float32, torch.bfloat16) and torch.is_grad_enabled() and x.requires_grad
        return "cpu" if fast else "plain"
    single = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return "triton" if triton and x.device.type == "cuda" and single and runs_triton(x.device) else "plain"


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device; the first call tries, and says so where they do not."""
    try:
        from llmkit.ops import kernels

        kernels.try_out(device)
    except Exception as error:  # not installed, no C compiler, or a card that is too old: each raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        note(f"Triton does not run on {device} ({reason}); the loss takes a slower way there, with the same result")
        return False
    return True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives to products on this tensor's device; None where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # not for the meta device
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off on this tensor's device, for what needs the precision of its inputs."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
