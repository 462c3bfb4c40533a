"""What a checkpoint carries beside the weights, and how a model comes back from it without any config file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkit import config, registry
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.module import LanguageModel

FORMAT = 1
"""Raised when an older llmkit could no longer read a new checkpoint."""


PARTS = ("model", "tokenizer", "tokenizer_state", "head_info", "config")
"""What llmkit's part of a checkpoint must have, beside its format."""

STRUCTURE = ("dim", "num_layers", "norm_first", "tie_embeddings")
PLUGINS = ("head", "attention", "cross_attention", "position", "feedforward", "norm")
"""The arguments of a model that decide which weights it has."""
ALIKE = ("attention", "position", "feedforward", "norm", "norm_first")
"""The arguments that decide what weights of the same names and shapes mean."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint file that was read."""

    path: Path
    content: dict[str, Any]

    @property
    def part(self) -> dict[str, Any]:
        """llmkit's own part."""
        part: dict[str, Any] = self.content["llmkit"]
        return part


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
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {file} cannot be read: it is damaged, or holds more than plain data") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {file} cannot be read: it is truncated or no checkpoint ({cause[:120]})"
        ) from error
    part = check_section(checkpoint, f"checkpoint {file}")
    missing = [name for name in PARTS if name not in part]
    if missing:
        raise UserError(f"checkpoint {file} is incomplete: it has no {', '.join(missing)}")
    if "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {file} has no weights")
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
    model.source = f"checkpoint {path}"
    model.configure_model()
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
    model.tokenizer = _tokenizer(part)
    model.head.set_info(part["head_info"])
    model.head_ready = True
    model.config = part["config"]


def _tokenizer(part: dict[str, Any]) -> Tokenizer:
    tokenizer: Tokenizer = registry.factory_of(part["tokenizer"], "tokenizer")()
    tokenizer.from_state(part["tokenizer_state"])
    return tokenizer


def initial(path: str | Path) -> tuple[Stored, Tokenizer]:
    """Return the weights and the tokenizer of the checkpoint that ``model.init_from`` names.

    Of its classes only the tokenizer's is needed. Raises UserError as ``load`` does.
    """
    try:
        content = read(path)
        part, where = content["llmkit"], f"checkpoint {path}"
        _check_known("tokenizer", part["tokenizer"]["class_path"], where, part["config"].get("imports") or [])
        kept = {name: content[name] for name in ("llmkit", "state_dict")}  # the optimizer's state is let go
        return Stored(Path(path), kept), _tokenizer(part)
    except ValueError as error:  # a UserError, or what ``from_state`` raises
        raise UserError(f"model.init_from: {error}") from error


def take_weights(model: LanguageModel, stored: Stored) -> str:
    """Copy every weight of a checkpoint that has the name and the shape of one of a built model.

    Returns a sentence that says what was taken and what was not. Raises UserError when nothing fits.
    """
    own, theirs = model.state_dict(), stored.content["state_dict"]
    common = [name for name in own if name in theirs]
    taken = [name for name in common if own[name].shape == theirs[name].shape]
    spec = stored.part["model"]
    parts = [(f"model.{key}", _name(spec.get(key)), _name(model.spec[key])) for key in ALIKE]
    left = {
        "of another shape": [
            f"{name} {tuple(theirs[name].shape)} there, {tuple(own[name].shape)} here"
            for name in common
            if name not in taken
        ],
        "only there": [name for name in theirs if name not in own],
        "only here": [name for name in own if name not in theirs],
        "another part": [f"{key} {there} there, {here} here" for key, there, here in parts if there != here],
    }
    told = "".join(f"; {what}: {_first(names)}" for what, names in left.items() if names)
    if not taken:
        raise UserError(f"model.init_from {stored.path}: none of its weights fits this model{told}")
    for name in taken:
        own[name].copy_(theirs[name])
    return f"model.init_from {stored.path}: {len(taken)} of its {len(theirs)} weights taken, and its tokenizer{told}"


def _first(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_fits(model: LanguageModel, stored: Stored, tokenizer: type | None) -> None:
    """Raise UserError, naming the key, when a model of the config cannot take the weights of a checkpoint.

    Args:
        model: the model as the config says.
        stored: the checkpoint.
        tokenizer: the tokenizer's class as the config says.
    """
    theirs = stored.part["model"]
    pairs = {f"model.{name}": (model.spec[name], theirs.get(name)) for name in STRUCTURE}
    pairs |= {f"model.{name}": (_name(model.spec[name]), _name(theirs.get(name))) for name in PLUGINS}
    if tokenizer is not None:
        own = registry.factory_of(stored.part["tokenizer"], "tokenizer")
        pairs["data.tokenizer"] = (tokenizer.__name__, registry.target_of(own).__name__)
    for key, (now, then) in pairs.items():
        if now != then:
            raise UserError(f"{key} is {now}, but checkpoint {stored.path} has {then}: its weights do not fit")


def check_weights(model: LanguageModel, stored: Stored) -> None:
    """Raise UserError when the weights of a checkpoint have other shapes than those of a restored model."""
    own_shapes = {f"net.{name}": value.shape for name, value in model.meta_network(restored=True).state_dict().items()}
    their_shapes = {k: v.shape for k, v in stored.content["state_dict"].items() if k.startswith("net.")}
    for name in sorted(own_shapes.keys() | their_shapes.keys()):
        if own_shapes.get(name) != their_shapes.get(name):
            now, then = own_shapes.get(name), their_shapes.get(name)
            raise UserError(f"checkpoint {stored.path}: its weights do not fit: {name} has {then}, the config {now}")


def _name(spec: Any) -> str:
    return str(spec["class_path"]).rpartition(".")[2] if isinstance(spec, dict) else str(spec)


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
