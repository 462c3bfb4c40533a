"""Whether a checkpoint's weights fit a model, and which of them a new run can begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit import registry
from llmkit.checkpoint.archive import file_of
from llmkit.checkpoint.content import Stored, check_classes, read, refusing, restore_tokenizer
from llmkit.contracts import Tokenizer
from llmkit.errors import Problem, UserError
from llmkit.ops.lora import LoRA, merged

PLUGINS = ("head", "attention", "cross_attention", "position", "feedforward", "norm")
STRUCTURE = (
    *PLUGINS,
    *("dim", "num_layers", "vocab_size", "norm_first", "tie_embeddings"),
    *("embedding_norm", "token_types", "output_bias", "lora"),
    *("decoder_layers", "separate_positions", "embedding_scale", "output_scale", "mup_base_dim"),
)
"""The arguments of a model that decide which weights it has, and what they are multiplied by."""
MEANING = ("attention", "position", "feedforward", "norm", "norm_first", "mup_base_dim")
"""The arguments that decide what weights of the same names and shapes mean."""


def initial(path: str | Path) -> tuple[Stored, Tokenizer]:
    """Return the weights and the tokenizer of the checkpoint that ``model.init_from`` names.

    Of its classes only the tokenizer's is needed; adapters are merged. Raises UserError when the file cannot be read.
    """
    path = file_of(path, "best.ckpt", "last.ckpt")
    content = read(path)
    part, where = content["llmkit"], f"checkpoint {path}"
    check_classes({**part, "model": {}}, where)
    kept = {name: content[name] for name in ("llmkit", "state_dict")}  # the optimizer's state is let go
    return without_adapters(Stored(Path(path), kept)), restore_tokenizer(part, where)


def without_adapters(stored: Stored) -> Stored:
    """Return a checkpoint whose adapters (``model.lora``) are merged into the weights. Raises UserError."""
    given = stored.part["model"].get("lora")
    if given is None:
        return stored
    with refusing(f"checkpoint {stored.path}: its adapters cannot be merged"):
        state = merged(stored.content["state_dict"], LoRA(**given).scale)
    part = {**stored.part, "model": {**stored.part["model"], "lora": None}}
    return Stored(stored.path, {**stored.content, "llmkit": part, "state_dict": state})


def take_weights(own: Mapping[str, Tensor], spec: Mapping[str, Any], stored: Stored) -> str:
    """Copy every weight of a checkpoint that has the name and the shape of one of a built model.

    Args:
        own: the model's weights, changed in place.
        spec: the model's description.
        stored: the checkpoint.

    Returns a sentence that says what was taken and what was not. Raises UserError when nothing fits.
    """
    theirs, other = stored.content["state_dict"], stored.part["model"]
    common = [name for name in own if name in theirs]
    taken = [name for name in common if own[name].shape == theirs[name].shape]
    parts = [(f"model.{key}", name_of(other.get(key)), name_of(spec[key])) for key in MEANING]
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
    summary = "".join(f"; {what}: {_first(names)}" for what, names in left.items() if names)
    if not taken:
        raise UserError(Problem("model.init_from", f"{stored.path}: none of its weights fits this model{summary}"))
    for name in taken:
        own[name].copy_(theirs[name])
    return f"model.init_from {stored.path}: {len(taken)} of its {len(theirs)} weights taken, and its tokenizer{summary}"


def _first(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_fits(spec: Mapping[str, Any], stored: Stored, tokenizer: type | None) -> None:
    """Raise UserError, naming the key, when a model of a config cannot take the weights of a checkpoint.

    Args:
        spec: the model's description, as the config says.
        stored: the checkpoint.
        tokenizer: the tokenizer's class, as the config says.
    """
    theirs = stored.part["model"]
    pairs = {f"model.{name}": (name_of(spec[name]), name_of(theirs.get(name, spec[name]))) for name in STRUCTURE}
    if tokenizer is not None:
        own = registry.factory_of(stored.part["tokenizer"], "tokenizer")
        pairs["data.tokenizer"] = (tokenizer.__name__, registry.target_of(own).__name__)
    for key, (now, then) in pairs.items():
        if now != then:
            raise UserError(Problem(key, f"is {now}, but checkpoint {stored.path} has {then}: its weights do not fit"))


def check_shapes(own: Mapping[str, Tensor], stored: Stored) -> None:
    """Raise UserError when the weights of a checkpoint have other names or shapes than a model's.

    Args:
        own: the weights of a model without memory (on the meta device), as the description says.
        stored: the checkpoint.
    """
    theirs = stored.content["state_dict"]
    roots = tuple({name.partition(".")[0] + "." for name in own})
    for name in sorted(own.keys() | {name for name in theirs if name.startswith(roots)}):
        now, then = (_kind(weights.get(name)) for weights in (own, theirs))
        if now != then:
            raise UserError(f"checkpoint {stored.path}: its weights do not fit: {name} has {then}, the config {now}")


def _kind(weight: Tensor | None) -> str:
    if weight is None:
        return "nothing"
    return f"{tuple(weight.shape)}" + ("" if weight.is_floating_point() else f" of {weight.dtype}")


def name_of(spec: Any) -> str:
    """Return the class name of a plugin's spec; any other value as text."""
    plugin = isinstance(spec, dict) and "class_path" in spec
    return str(spec["class_path"]).rpartition(".")[2] if plugin else str(spec)


def check_class(stored: Stored, brought: type, configured: type) -> None:
    """Raise UserError when the configured tokenizer is of another class than the one that ``init_from`` brings."""
    if configured is not brought:
        text = (
            f"is {configured.__name__}, but model.init_from {stored.path} brings a trained {brought.__name__}: "
            "remove data.tokenizer or model.init_from"
        )
        raise UserError(Problem("data.tokenizer", text))


def unfit(source: str, error: RuntimeError) -> UserError:
    """Return torch's error about weights that do not fit a model as one line."""
    details = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
    text = f"its weights do not fit the model, {len(details)} difference(s), the first: {details[0][:300]}"
    return UserError(f"{source}: {text}")
