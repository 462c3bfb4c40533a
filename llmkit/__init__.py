"""llmkit: language model experiments on PyTorch Lightning, where every part is a plugin.

The public names below are imported when they are first used, so that ``import llmkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.checkpoint import load
    from llmkit.contracts import (
        Attention,
        DecodingOptions,
        Feedforward,
        Head,
        Memory,
        Norm,
        Position,
        Sequence,
        State,
        Tokenizer,
    )
    from llmkit.data import DataModule
    from llmkit.errors import UserError
    from llmkit.module import LanguageModel
    from llmkit.registry import plugin, register
    from llmkit.saving import Checkpoints

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Checkpoints",
    "DataModule",
    "DecodingOptions",
    "Feedforward",
    "Head",
    "LanguageModel",
    "Memory",
    "Norm",
    "Position",
    "Sequence",
    "State",
    "Tokenizer",
    "UserError",
    "__version__",
    "load",
    "plugin",
    "register",
]

_HOMES = {
    "Checkpoints": "llmkit.saving",
    "DataModule": "llmkit.data",
    "LanguageModel": "llmkit.module",
    "UserError": "llmkit.errors",
    "load": "llmkit.checkpoint",
    "plugin": "llmkit.registry",
    "register": "llmkit.registry",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmkit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES.get(name, "llmkit.contracts")), name)
    globals()[name] = value  # the next look finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
