"""What a checkpoint carries next to the weights: enough to use the model without any config file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit import imports, registry
from llmkit.checkpoint import archive
from llmkit.checkpoint.sources import class_paths, sources, version
from llmkit.contracts import Head, Tokenizer
from llmkit.errors import UserError

FORMAT = 1
"""Raised when an older llmkit could no longer read a new checkpoint."""

PARTS: dict[str, type] = {"model": dict, "tokenizer": dict, "tokenizer_state": str, "head_info": dict, "config": dict}
"""What llmkit's section of a checkpoint must have, next to its format."""

MOVED = {"llmkit.optim.": "llmkit.model.optim."}
"""Modules that older checkpoints name, and where their classes are now."""

LIMITS = {"context": 2**24, "max_new_tokens": 2**20, "num_beams": 2**10}
"""Sizes that no weight confirms; larger ones are taken for damage."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint file that was read."""

    path: Path
    content: dict[str, Any]

    @property
    def part(self) -> dict[str, Any]:
        """llmkit's own section."""
        part: dict[str, Any] = self.content["llmkit"]
        return part


def section(
    spec: dict[str, Any],
    tokenizer: Tokenizer,
    head: Head,
    config: dict[str, Any],
    compression: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what makes a checkpoint complete, as plain data; ``compression``: what has been done to the weights."""
    packages = ("llmkit", "torch", "lightning", "tokenizers")
    parts = {"model": spec, "tokenizer": registry.spec_of_instance(tokenizer)}
    plugins = class_paths([parts, *(step["method"] for step in compression)])
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in packages},
        "sources": sources(path.rpartition(".")[0] for path in plugins),
        **parts,
        "tokenizer_state": tokenizer.to_state(),
        "head_info": head.info(),
        "config": config,
        **({"compression": list(compression)} if compression else {}),
    }


def begins_with(tokenizer: Tokenizer, config: Mapping[str, Any]) -> int:
    """Return the id that documents began with in training.

    A stream that is not packed has an end of text between documents, and no beginning.

    Args:
        tokenizer: the model's.
        config: of the run that trained it.
    """
    if tokenizer.around[0]:
        return tokenizer.around[0][0]
    return tokenizer.bos_id if (config.get("data") or {}).get("pack") else tokenizer.eos_id


def check_section(checkpoint: Any, where: str) -> dict[str, Any]:
    """Return llmkit's section of a checkpoint. Raises UserError when there is none or it is of a newer format."""
    part = checkpoint.get("llmkit") if isinstance(checkpoint, dict) else None
    if not isinstance(part, dict) or type(part.get("format")) is not int:
        raise UserError(f"{where} is not an llmkit checkpoint: it has no 'llmkit' section")
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

    Raises:
        UserError: the file is missing, damaged, not ours, of a newer format, or claims more than it holds.
    """
    return checked(archive.read(Path(path)), f"checkpoint {path}")


def checked(checkpoint: Any, where: str) -> dict[str, Any]:
    """Return the content of a checkpoint, with the class paths of now. Raises UserError as ``read``."""
    part = check_section(checkpoint, where)
    missing = [name for name in PARTS if name not in part]
    if missing:
        raise UserError(f"{where} is incomplete: it has no {', '.join(missing)}")
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) and type(k) is str for k, v in weights.items()):
        raise UserError(f"{where} has no weights")
    with refusing(f"{where} is damaged"):
        archive.check(part, strict=True)
        for name, kind in PARTS.items():
            if not isinstance(part[name], kind):
                raise UserError(f"its {name} should be {'text' if kind is str else 'a mapping'}")
        if not all(isinstance(step, dict) and {"method", "made"} <= step.keys() for step in compression(part)):
            raise UserError("its compression should be a list of methods, and what each has made")
        _check_limits(part["model"], weights)
        _check_paths(checkpoint.get("callbacks"))
    return {**checkpoint, "llmkit": _moved(part)}


def compression(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the methods that compressed a checkpoint, in order: ``method``, a plugin's spec, and what it ``made``."""
    found: list[dict[str, Any]] = part.get("compression", [])
    return found


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn whatever is raised over a checkpoint's data into a UserError that begins with ``where``."""
    try:
        yield
    except Exception as error:  # a plugin may raise anything when it is given what it never wrote
        text = str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: {' '.join(text.split())[:300]}") from error


def _check_limits(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse sizes that could keep a computer busy before the weights contradict them. Raises UserError."""
    sizes = {**spec, **(spec["decoding"] if isinstance(spec.get("decoding"), dict) else {})}
    widest = max((side for weight in weights.values() for side in weight.shape), default=0)
    for name, most in {**LIMITS, "num_layers": len(weights), "decoder_layers": len(weights), "dim": widest}.items():
        value = sizes.get(name)
        if type(value) is int and value > most:
            raise UserError(f"its model has {name} {value}, and the most that its weights allow is {most}")


def _check_paths(callbacks: Any) -> None:
    """Refuse files outside of its folder among those that ModelCheckpoint would delete. Raises UserError."""
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict):
            continue
        best = state.get("best_k_models")
        paths = [
            state.get("last_model_path"),
            state.get("kth_best_model_path"),
            *(best if isinstance(best, dict) else ()),
        ]
        for path in map(str, paths):
            # ModelCheckpoint deletes what begins with its folder, and does not see a path that leaves it further on.
            if re.search(r"[^./\\][/\\]+\.\.([/\\]|$)", path):
                raise UserError(f"a ModelCheckpoint in it names {path[:100]!r}, outside of its folder")


def _moved(value: Any) -> Any:
    """Return plain data with the class paths of an older llmkit as they are now."""
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if isinstance(value, str):
        return next((new + value[len(old) :] for old, new in MOVED.items() if value.startswith(old)), value)
    return value


def restore_tokenizer(part: Mapping[str, Any], where: str) -> Tokenizer:
    """Return a checkpoint's tokenizer, once it has turned a text to ids in its range and back."""
    with refusing(f"{where}: its tokenizer cannot be restored"):
        tokenizer: Tokenizer = registry.factory_of(part["tokenizer"], "tokenizer")()
        tokenizer.from_state(part["tokenizer_state"])
        special = [getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos", "unk", "mask", "sep")]
        ids = special + tokenizer.encode("a b\n")
        if not all(0 <= number < tokenizer.vocab_size for number in ids):
            raise UserError("it has ids out of its range")
        tokenizer.decode(ids)
    return tokenizer


def check_classes(part: Mapping[str, Any], where: str) -> None:
    """Refuse classes that are neither installed as plugins nor imported by the user: a checkpoint runs no code."""
    keys = {key.partition(".")[2] for key in registry.FAMILY_OF if key.startswith("model.")}
    specs = {key: part["model"].get(key) for key in part["model"] if key in keys} | {"tokenizer": part["tokenizer"]}
    specs |= {f"compression {number}": step["method"] for number, step in enumerate(compression(part), 1)}
    for key, spec in specs.items():
        if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
            raise UserError(f"{where} is damaged: {key} has no class_path")
        if imports.is_plugin(spec["class_path"]):
            continue
        module = spec["class_path"].rpartition(".")[0]
        if module == "__main__":
            raise UserError(
                f"{where} needs {key} {spec['class_path'][:200]}, a class of the script or notebook that trained it: "
                "it can be loaded there alone, once the code that registers the class has run"
            )
        listed = part["config"].get("imports") or []
        names = [name for name in (listed if isinstance(listed, list) else [listed]) if isinstance(name, str)]
        source = next((name for name in names if Path(name).stem == module), module)
        raise UserError(
            f"{where} needs {key} {spec['class_path'][:200]}, which is not an installed plugin. If you trust it, "
            f"import it yourself: --imports {source[:200]}"
        )
