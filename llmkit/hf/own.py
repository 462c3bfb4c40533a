"""Folders whose model is llmkit's own: the architecture ``llmkit``, for parts that no other one has.

transformers loads them through ``llmkit.interop.transformers``. config.json carries what a checkpoint carries, so that
a folder is read back as the checkpoint that it was made from; the tokenizer's state is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit import registry
from llmkit.checkpoint.content import Stored, check_classes, checked
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError
from llmkit.hf.architecture import Settings, classes
from llmkit.hf.facts import part as plugin_of
from llmkit.hf.folder import Config, Source

OWN = "llmkit"
"""The model_type, and the key of config.json that the description of the model stands under."""
STATE = "llmkit_tokenizer.json"
"""The file with the tokenizer's state."""
CODE = "modeling_llmkit.py"
"""The file that transformers imports when it may run code of the folder."""

HEADS = {
    **dict.fromkeys(("generation", "completion"), "CausalLM"),
    **dict.fromkeys(("translation", "summarization"), "Seq2SeqLM"),
    **dict.fromkeys(("classification", "multi_label", "regression"), "SequenceClassification"),
    "masked_lm": "MaskedLM",
}
"""The heads that transformers has a class for."""

NOT_OF_THE_NETWORK = (
    *("head", "decoding", "optimizer", "scheduler", "dropout", "gradient_checkpointing", "compile", "freeze"),
    *("layer_decay", "ema", "lora", "distill", "max_bad_steps", "vocab_size"),
)
"""Settings of a description that another run with its weights may set as it likes; vocab_size stands in config.json."""


def own_config(part: Mapping[str, Any], labels: list[str], vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        part: llmkit's section of a checkpoint.
        labels: the names of a classifier's labels.
        vocab_size: rows of the embedding.

    Raises UserError for a head that transformers has no class for.
    """
    spec, config = part["model"], part["config"]
    head, given = plugin_of("head", spec["head"])
    if head not in HEADS:
        raise UserError(f"transformers has no counterpart of the head {head}; these can be written: {', '.join(HEADS)}")
    if len(given.get("start") or ()) > 2:
        raise UserError(f"transformers begins a text with at most two tokens, and the head has start {given['start']}")
    name = f"LlmkitFor{HEADS[head]}"
    module = CODE.removesuffix(".py")
    used = {"imports": config.get("imports"), "data": {"pack": (config.get("data") or {}).get("pack")}}
    return {
        "model_type": OWN,
        "architectures": [name],
        "auto_map": {"AutoConfig": f"{module}.LlmkitConfig", f"AutoModelFor{HEADS[head]}": f"{module}.{name}"},
        "hidden_size": spec["dim"],
        "num_hidden_layers": spec["num_layers"],
        "max_position_embeddings": spec["context"],
        "vocab_size": vocab_size,
        "is_encoder_decoder": HEADS[head] == "Seq2SeqLM",
        "tie_word_embeddings": False,  # a matrix that is used twice is one weight: there is nothing to tie
        **classes(head, labels),
        OWN: {**{key: value for key, value in part.items() if key != "tokenizer_state"}, "config": used},
    }


def code(architecture: str) -> str:
    """Return the content of the folder's ``CODE``: what it names comes with llmkit, which has to be installed."""
    return f"from llmkit.interop.transformers import LlmkitConfig, {architecture}  # noqa: F401\n"


def described(config: Config) -> dict[str, Any]:
    """Return the description in a config.json. Raises UserError when there is none, or a class is not installed."""
    part = config.get(OWN)
    if not isinstance(part, dict) or not isinstance(part.get("model"), dict):
        raise UserError(f"{config.where} does not describe its model: it has no '{OWN}'")
    part = {"config": {}, **part, "model": {**part["model"], "vocab_size": config.size("vocab_size")}}
    if not isinstance(part["config"], dict):
        raise UserError(f"{config.where} is damaged: its config should be a mapping")
    check_classes({**part, "tokenizer": part.get("tokenizer")}, config.where)
    return part


def own_settings(config: Config) -> Settings:
    """Return the settings of the network, keys below ``model``, and its head. Raises UserError as ``described``."""
    spec = described(config)["model"]
    kept = {key: value for key, value in spec.items() if key not in NOT_OF_THE_NETWORK}
    return {**kept, "vocab_size": spec["vocab_size"], "head": spec["head"]}


def own_stored(source: Source, config: Config, tokenizer: Tokenizer | None) -> Stored:
    """Return a folder as the checkpoint that it was made from.

    Args:
        source: the folder.
        config: its config.json.
        tokenizer: of its tokenizer.json, where transformers saved the folder, which leaves the file ``STATE`` out.

    Raises UserError when a file is missing or damaged, or claims more than it holds.
    """
    part = described(config)
    if tokenizer is None:
        part["tokenizer_state"] = source.text_of(STATE)
    else:
        part |= {"tokenizer": registry.spec_of_instance(tokenizer), "tokenizer_state": tokenizer.to_state()}
    content = {"llmkit": part, "state_dict": source.weights()}
    return Stored(Path(source.text), checked(content, source.text))
