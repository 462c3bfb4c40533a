"""What a checkpoint carries beside the weights, and how a model comes back from it without any config file."""

from __future__ import annotations

import copy
import json
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkit import registry
from llmkit.checkpoint import archive
from llmkit.checkpoint.plausible import PLUGINS, wrong_paths, wrong_sizes, wrong_types
from llmkit.config import trust
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError

if TYPE_CHECKING:
    from llmkit.model.language_model import LanguageModel

FORMAT = 1
"""Raised when an older llmkit could no longer read a new checkpoint."""


PARTS = ("model", "tokenizer", "tokenizer_state", "head_info", "config")
"""What llmkit's part of a checkpoint must have, beside its format."""

STRUCTURE = ("dim", "num_layers", "norm_first", "tie_embeddings")
"""The arguments of a model, beside its plugins, that decide which weights it has."""
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
    if not isinstance(part, dict) or type(part.get("format")) is not int:
        raise UserError(f"{where} is not an llmkit checkpoint: it has no 'llmkit' part")
    if part["format"] > FORMAT:
        versions = part.get("versions")
        made_by = versions.get("llmkit") if isinstance(versions, dict) else None
        raise UserError(
            f"{where} is of format {part['format']}, written by llmkit {str(made_by or '(a newer version)')[:40]}; "
            f"this one reads up to {FORMAT}. Upgrade llmkit."
        )
    return part


def read(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint file's content, loaded as data only (``weights_only=True``).

    Its description of the model is of the right types, and of the sizes of its weights.

    Raises:
        UserError: the file is missing, damaged, not ours, of a newer format, or contradicts itself.
    """
    checkpoint = archive.read(Path(path))
    where = f"checkpoint {path}"
    part = check_section(checkpoint, where)
    missing = [name for name in PARTS if name not in part]
    if missing:
        raise UserError(f"{where} is incomplete: it has no {', '.join(missing)}")
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) and type(k) is str for k, v in weights.items()):
        raise UserError(f"{where} has no weights")
    try:
        archive.check(part, strict=True)
        wrong = wrong_types(part) or wrong_sizes(part["model"], weights) or wrong_paths(checkpoint.get("callbacks"))
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{where} is damaged: {wrong}")
    return checkpoint  # type: ignore[no-any-return]


def load(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Return the model of a checkpoint, ready to predict, in eval mode. It is not compiled.

    Args:
        path: a ``.ckpt`` file written by ``llmkit fit``.
        device: where the model is put.

    Raises:
        UserError: missing or damaged file, a newer format, weights of other sizes than its description says, or a
            plugin that is not installed.
    """
    stored = Stored(Path(path), read(path))
    where = f"checkpoint {path}"
    model = build({**stored.part, "model": {**stored.part["model"], "compile": False}}, where)
    model.source = where
    check_weights(model, stored)
    with _told(f"{where} describes no model"):
        model.configure_model()
    model.load_state_dict(stored.content["state_dict"])
    return model.to(device).eval()


def build(part: dict[str, Any], where: str) -> LanguageModel:
    """Return a model without weights from llmkit's part of a checkpoint, its tokenizer and labels restored.

    Raises UserError, naming ``where``, when its classes are not installed or do not take what it says.
    """
    from llmkit.model.language_model import LanguageModel

    check_classes(part, where)
    with _told(f"{where} describes no model"):
        if "init_from" in part["model"]:
            raise UserError("a checkpoint begins with its own weights, it has no init_from")
        model = LanguageModel(**part["model"])
    restore(model, part, where)
    return model


def restore(model: LanguageModel, part: dict[str, Any], where: str = "the checkpoint") -> None:
    """Give a model the tokenizer, label names and config that a checkpoint carries.

    Raises UserError, naming ``where``, when they are not what the classes wrote.
    """
    model.tokenizer = _tokenizer(part, where)
    with _told(f"{where}: its head_info does not fit {type(model.head).__name__}"):
        model.head.set_info(part["head_info"])
        if json.dumps(model.head.info()) != json.dumps(part["head_info"]):
            raise UserError("it comes back as something else")
    model.head_ready = True
    model.config = part["config"]


def _tokenizer(part: dict[str, Any], where: str) -> Tokenizer:
    """Return a checkpoint's tokenizer, once it has turned a text to ids in its range and back."""
    with _told(f"{where}: its tokenizer cannot be restored"):
        tokenizer: Tokenizer = registry.factory_of(part["tokenizer"], "tokenizer")()
        tokenizer.from_state(part["tokenizer_state"])
        special = [getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos", "unk", "mask", "sep")]
        ids = special + tokenizer.encode("a b\n")
        if not all(0 <= number < tokenizer.vocab_size for number in ids):
            raise UserError("it has ids out of its range")
        tokenizer.decode(ids)
    return tokenizer


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn whatever a class raises over a checkpoint's data into a UserError that begins with ``where``."""
    try:
        yield
    except Exception as error:  # a plugin may raise anything when it is given what it never wrote
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: {' '.join(text.split())[:300]}") from error


def is_to_blame(stored: Stored, error: Exception, step: int) -> bool:
    """Return whether an error comes of the training state in a checkpoint.

    It does when it came up while Lightning took the state over, or over a value in the first step after that.

    Args:
        stored: the checkpoint that a command began with.
        error: what was raised, by no plugin.
        step: the optimizer step that it was raised in; -1: the command does not train.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename.endswith("checkpoint_connector.py") and re.match("_?(restore|resume)", code.co_name):
            return True
    begun = stored.content.get("global_step")
    first = isinstance(begun, int) and 0 <= step <= begun + 1
    return first and isinstance(error, TypeError | ValueError | LookupError | AttributeError)


def initial(path: str | Path) -> tuple[Stored, Tokenizer]:
    """Return the weights and the tokenizer of the checkpoint that ``model.init_from`` names.

    Of its classes only the tokenizer's is needed. Raises UserError as ``load`` does.
    """
    try:
        content = read(path)
        part, where = content["llmkit"], f"checkpoint {path}"
        check_classes({**part, "model": {}}, where)
        kept = {name: content[name] for name in ("llmkit", "state_dict")}  # the optimizer's state is let go
        return Stored(Path(path), kept), _tokenizer(part, where)
    except UserError as error:
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
    """Raise UserError when the weights of a checkpoint have other shapes than those of a restored model.

    The model's are those of a network without memory, so that nothing is built that the file does not hold.
    """
    assert model.tokenizer is not None
    where, theirs = f"checkpoint {stored.path}", stored.content["state_dict"]
    vocab, rows = model.tokenizer.vocab_size, len(theirs["net.embedding.weight"])
    if vocab != rows:
        raise UserError(
            f"{where}: its weights do not fit: its tokenizer has {vocab} ids, and its embedding {rows} rows"
        )
    with _told(f"{where} describes no model"):
        own = {f"net.{name}": value for name, value in model.meta_network(restored=True).state_dict().items()}
        head = copy.deepcopy(model.head)
        try:
            with torch.device("meta"):
                head.set_tokenizer(model.tokenizer)
                head.build(model.spec["dim"], vocab)
            own |= {f"head.{name}": value for name, value in head.state_dict().items()}
        except NotImplementedError:  # an operation that needs memory: of the head, loading tells
            pass
    parts = tuple({name.partition(".")[0] + "." for name in own})
    for name in sorted(own.keys() | {name for name in theirs if name.startswith(parts)}):
        now, then = (_kind(weights.get(name)) for weights in (own, theirs))
        if now != then:
            raise UserError(f"{where}: its weights do not fit: {name} has {then}, the config {now}")


def _kind(weight: Tensor | None) -> str:
    if weight is None:
        return "nothing"
    return f"{tuple(weight.shape)}" + ("" if weight.is_floating_point() else f" of {weight.dtype}")


def _name(spec: Any) -> str:
    return str(spec["class_path"]).rpartition(".")[2] if isinstance(spec, dict) else str(spec)


def check_classes(part: dict[str, Any], where: str) -> None:
    """Refuse classes that are neither installed as plugins nor imported by the user: a checkpoint runs no code."""
    specs = {key: value for key, value in part["model"].items() if isinstance(value, dict) and "class_path" in value}
    for key, spec in {**specs, "tokenizer": part["tokenizer"]}.items():
        if trust.is_plugin(spec["class_path"]):
            continue
        module = spec["class_path"].rpartition(".")[0]
        imports = part["config"].get("imports") or []
        names = [name for name in (imports if isinstance(imports, list) else [imports]) if isinstance(name, str)]
        source = next((name for name in names if Path(name).stem == module), module)
        raise UserError(
            f"{where} needs {key} {spec['class_path'][:200]}, which is no installed plugin. If you trust it, import it "
            f"yourself: --imports {source[:200]}"
        )
