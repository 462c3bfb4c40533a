"""What a checkpoint carries beside the weights, and how a model comes back from it without any config file."""

from __future__ import annotations

import pickle
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkit import config, registry
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.module import LanguageModel

FORMAT = 1
"""Raised when an older llmkit could no longer read a new checkpoint."""


def section(model: LanguageModel) -> dict[str, Any]:
    """Return what makes a checkpoint of ``model`` complete, as plain data."""
    assert model.tokenizer is not None
    packages = ("llmkit", "torch", "lightning", "tokenizers")
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in packages},
        "model": model.spec,
        "tokenizer": registry.spec_of_instance(model.tokenizer),
        "tokenizer_state": model.tokenizer.to_state(),
        "head_info": model.head.info(),
        "config": model.config,
    }


def check_section(checkpoint: Any, where: str) -> dict[str, Any]:
    """Return llmkit's part of a checkpoint. Raises UserError when there is none or it is of a newer format."""
    part = checkpoint.get("llmkit") if isinstance(checkpoint, dict) else None
    if not isinstance(part, dict) or not isinstance(part.get("format"), int):
        raise UserError(f"{where} is not an llmkit checkpoint: it has no 'llmkit' part")
    if part["format"] > FORMAT:
        made_by = part.get("versions", {}).get("llmkit", "a newer version")
        raise UserError(
            f"{where} is of format {part['format']}, written by llmkit {made_by}; this one reads up to {FORMAT}. "
            "Upgrade llmkit."
        )
    return part


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint file's content, loaded as data only (``weights_only=True``).

    Raises UserError when the file is missing, damaged, not ours or of a newer format.
    """
    file = Path(path)
    if not file.is_file():
        last = " It is a folder." if file.is_dir() else ""
        raise UserError(f"checkpoint {file} does not exist.{last}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {file} cannot be read: it is truncated or no checkpoint ({cause[:120]})"
        ) from error
    check_section(checkpoint, f"checkpoint {file}")
    return checkpoint  # type: ignore[no-any-return]


def load(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Return the model of a checkpoint, ready to predict, in eval mode.

    Args:
        path: a ``.ckpt`` file written by ``llmkit fit``.
        device: where the model is put.

    Raises:
        UserError: missing or damaged file, a newer format, or a plugin that is not installed.
    """
    checkpoint = read(path)
    model = build(checkpoint["llmkit"], f"checkpoint {path}")
    model.configure_model()
    if "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path} has no weights")
    model.load_state_dict(checkpoint["state_dict"])
    return model.to(device).eval()


def build(part: dict[str, Any], where: str) -> LanguageModel:
    """Return a model without weights from llmkit's part of a checkpoint, its tokenizer and labels restored."""
    from llmkit.module import LanguageModel

    try:
        spec = dict(part["model"])
        specs = [(k, v) for k, v in [*spec.items(), ("tokenizer", part["tokenizer"])] if isinstance(v, dict)]
        for key, value in specs:
            if "class_path" in value:
                _check_known(key, value["class_path"], where, part["config"].get("imports") or [])
        model = LanguageModel(**spec)
        restore(model, part)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} is incomplete: {type(error).__name__}: {error}") from error
    return model


def restore(model: LanguageModel, part: dict[str, Any]) -> None:
    """Give a model the tokenizer, label names and config that a checkpoint carries."""
    tokenizer = registry.factory_of(part["tokenizer"], "tokenizer")()
    tokenizer.from_state(part["tokenizer_state"])
    model.tokenizer = tokenizer
    model.head.set_info(part["head_info"])
    model.head_ready = True
    model.config = part["config"]


def _check_known(key: str, class_path: str, where: str, imports: list[str]) -> None:
    """Refuse a class that is neither installed as a plugin nor imported by the user: a checkpoint runs no code."""
    module = class_path.rpartition(".")[0]
    packages = {
        entry.target.partition(":")[0] for family in registry.DEFAULTS for entry in registry.entries(family).values()
    }
    if module.partition(".")[0] in {"torch", "llmkit", *(name.partition(".")[0] for name in packages)}:
        return
    if module in config.imported:
        return
    source = next((name for name in imports if Path(name).stem == module), module)
    raise UserError(
        f"{where} needs {key} {class_path}, which is no installed plugin. If you trust it, import it yourself: "
        f"--imports {source}"
    )
