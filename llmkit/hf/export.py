"""Folders in the format of Hugging Face: weights, config.json, tokenizer, generation config and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from llmkit.contracts import Tokenizer
from llmkit.errors import UserError
from llmkit.hf.native import native

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")


@runtime_checkable
class Publishable(Protocol):
    """A tokenizer that can be written as a tokenizer.json."""

    def published(self) -> dict[str, Any]:
        """Return the content of the file; special tokens are among its ``added_tokens``."""


def export(folder: Path, part: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Tokenizer, card: str) -> str:
    """Write a model into a new folder; returns the name of its architecture.

    Args:
        folder: is created; must not exist.
        part: llmkit's section of a checkpoint.
        state: its weights.
        tokenizer: its tokenizer.
        card: the text of the model card.

    Raises UserError when the folder exists, or model or tokenizer cannot be written in this format.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError("writing models of Hugging Face needs safetensors: pip install 'llmkit[hf]'") from error
    spec = part["model"]
    content, weights = native(spec, state, list(part["head_info"].get("labels", [])))
    if not isinstance(tokenizer, Publishable):
        raise UserError(f"the tokenizer {type(tokenizer).__name__} cannot be written as a tokenizer.json")
    packed = bool((part["config"].get("data") or {}).get("pack"))
    # Without packing no text of the training data began with bos, while eos stood before each.
    numbers = {
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id if packed else tokenizer.eos_id,
        "eos": tokenizer.eos_id,
    }
    if tokenizer.around[0]:
        numbers["bos"] = tokenizer.around[0][0]
    ids = {f"{role}_token_id": number for role, number in numbers.items()}
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    _write(folder / "config.json", {**content, **ids, "dtype": "float32"})
    _write_tokenizer(folder, tokenizer, tokenizer.published(), int(spec["context"]))
    if content["architectures"][0].endswith(("LMHeadModel", "ForCausalLM")):
        _write(folder / "generation_config.json", {**ids, **_generation(spec["decoding"], tokenizer)})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    return str(content["architectures"][0])


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(decoding: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how text is generated, and the tokens that never are: special ones but the end."""
    special = {getattr(tokenizer, f"{role}_id") for role in ROLES} - {tokenizer.eos_id}
    sampled = bool(decoding["temperature"]) and decoding["num_beams"] == 1
    how = {"temperature": decoding["temperature"], "top_k": decoding["top_k"], "top_p": decoding["top_p"]}
    return {
        "do_sample": sampled,
        **(how if sampled else {}),
        "num_beams": decoding["num_beams"],
        "max_new_tokens": decoding["max_new_tokens"],
        "suppress_tokens": sorted(special),
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, data: dict[str, Any], context: int) -> None:
    if not any(tokenizer.around):
        data["post_processor"] = None
    names = {token["id"]: token["content"] for token in data["added_tokens"]}
    roles = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
    for role, number in roles.items():
        if number not in names:  # an id that the tokenizer.json did not have a token for
            names[number] = f"<llmkit_{role}>"
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append({"id": number, "content": names[number], **flags, "special": True})
    _write(folder / "tokenizer.json", data)
    settings = {
        **{f"{role}_token": names[number] for role, number in roles.items()},
        "cls_token": names[roles["bos"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if template := getattr(tokenizer, "chat_template", None):
        settings["chat_template"] = template  # which spells special tokens
    else:
        settings["split_special_tokens"] = True  # a text that spells the name of a special token is text
    _write(folder / "tokenizer_config.json", settings)
