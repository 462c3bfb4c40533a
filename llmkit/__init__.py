"""llmkit: language model experiments on PyTorch Lightning, where every part is a plugin.

The public names below are imported when they are first used, so that ``import llmkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.analysis.compress.chain import compress
    from llmkit.analysis.explain import explain
    from llmkit.api.result import Run
    from llmkit.api.run import fit, predict, test, validate
    from llmkit.compression import Compression
    from llmkit.contracts import Attention, Feedforward, Head, Norm, Position, Tokenizer
    from llmkit.data import DataModule
    from llmkit.errors import UserError
    from llmkit.model.language_model import LanguageModel, load
    from llmkit.registry import plugin, register
    from llmkit.run.saving import Checkpoints
    from llmkit.sequence import DecodingOptions, Memory, Sequence, State

__version__ = "0.1.0"

_HOMES = {
    name: f"llmkit.{home}"
    for home, names in {
        "analysis.compress.chain": "compress",
        "compression": "Compression",
        "analysis.explain": "explain",
        "api.result": "Run",
        "api.run": "fit predict test validate",
        "contracts": "Attention Feedforward Head Norm Position Tokenizer",
        "data": "DataModule",
        "errors": "UserError",
        "model.language_model": "LanguageModel load",
        "registry": "plugin register",
        "run.saving": "Checkpoints",
        "sequence": "DecodingOptions Memory Sequence State",
    }.items()
    for name in names.split()
}
"""Public name -> the module that defines it."""

__all__ = [
    "Attention",
    "Checkpoints",
    "Compression",
    "DataModule",
    "DecodingOptions",
    "Feedforward",
    "Head",
    "LanguageModel",
    "Memory",
    "Norm",
    "Position",
    "Run",
    "Sequence",
    "State",
    "Tokenizer",
    "UserError",
    "__version__",
    "compress",
    "explain",
    "fit",
    "load",
    "plugin",
    "predict",
    "register",
    "test",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmkit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
