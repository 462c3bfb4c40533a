"""The one rule for which implementation of a function in ``llmkit.ops`` computes a call."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from llmkit.errors import note

Backend = Literal["plain", "cpu", "triton"]
FEW_ROWS = 32
"""Most rows that are multiplied by packed weights: with more of them making the matrix takes less time."""


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


def multiplies_packed(x: Tensor, shape: tuple[int, int]) -> bool:
    """Return whether torch multiplies inputs by a matrix of packed eight-bit or four-bit numbers without unpacking it.

    Its kernels for CPUs are for bfloat16 (in float32 they take many times as long) and few rows. They have no gradient,
    and check nothing: of sizes that do not fit they read what is not theirs.

    Args:
        x: the inputs, (..., columns).
        shape: rows and columns of the matrix.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    differentiated = torch.is_grad_enabled() and x.requires_grad
    few = 0 < x.numel() <= FEW_ROWS * shape[1] and not differentiated
    fits = shape[0] % 16 == 0 and shape[1] % 32 == 0 and x.is_contiguous() and x.data_ptr() % 32 == 0
    return few and fits and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


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
