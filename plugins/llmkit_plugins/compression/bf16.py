"""Numbers of half the size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkit.compression import Calibration, Compression


class BF16(Compression):
    """All weights, and with them what is computed, in bfloat16: half the bytes, and faster where a CPU computes in it.

    Recurrences compute in float32 all the same.
    """

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Round every number that is not a whole one."""
        model.to(torch.bfloat16)
        return {}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Change the type of the numbers."""
        model.to(torch.bfloat16)
