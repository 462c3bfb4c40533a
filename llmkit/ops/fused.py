"""Linear maps computed as one: which rows of a weight are maps of their own."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def fused(module: M, sizes: list[int], *names: str) -> M:
    """Mark weights of a module as several maps above each other; Muon orthogonalises each by itself.

    Args:
        module: the module, which is returned.
        sizes: the number of rows of each map.
        names: names of the weights; none: ``weight``.
    """
    module.fused = dict.fromkeys(names or ("weight",), sizes)  # type: ignore[assignment]
    return module
