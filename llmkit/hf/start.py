"""A published model as the beginning of a run: its settings, its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit import registry
from llmkit.checkpoint.content import Stored, restore_tokenizer
from llmkit.checkpoint.weights import initial, take_weights
from llmkit.contracts import Tokenizer
from llmkit.errors import Problem, UserError
from llmkit.hf.adapter import Adapter, read_adapter
from llmkit.hf.architecture import Architecture, Settings
from llmkit.hf.decoders import GPT2, Llama
from llmkit.hf.encoders import Bert, DistilBert, Roberta
from llmkit.hf.folder import PREFIX, Config, Source
from llmkit.hf.mapping import listed, take
from llmkit.hf.own import OWN, STATE, own_settings, own_stored
from llmkit.hf.sequence_to_sequence import MT5, T5, Bart, Marian, check_start

KEY = "model.init_from"

ARCHITECTURES: dict[str, type[Architecture]] = {
    "gpt2": GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama),
    "bert": Bert,
    "roberta": Roberta,
    "distilbert": DistilBert,
    "marian": Marian,
    "bart": Bart,
    "t5": T5,
    "mt5": MT5,
}
"""Architectures by their model_type."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(("gpt_neox", "phi", "gptj", "falcon"), "attention and feedforward are parallel in its layers"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "its norms and embeddings are scaled differently"),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"), "its layers are mixtures of experts"
    ),
    "albert": "its layers share their weights",
    **dict.fromkeys(("deberta", "deberta-v2"), "its attention has positions of its own"),
    "xlnet": "its attention has positions of its own",
    **dict.fromkeys(("mbart", "m2m_100"), "its texts begin with a token of their language"),
    "pegasus": "its positions are not those of its family",
    "whisper": "it reads sound",
}
"""Well-known architectures that cannot be taken, and why."""


def is_published(init_from: Any) -> bool:
    """Return whether ``model.init_from`` means a model of Hugging Face."""
    return isinstance(init_from, str) and init_from.startswith(PREFIX)


def architecture_of(config: Config) -> Architecture:
    """Return the architecture of a config.json. Raises UserError, with the reason, for one that cannot be taken."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        why = f"{REFUSED[kind]}; " if kind in REFUSED else ""
        text = f"model_type {kind!r:.60} is not supported: {why}these are: {', '.join(ARCHITECTURES)}"
        raise UserError(f"{config.source}: {text}")
    return ARCHITECTURES[kind](config)


def settings_of(init_from: str, head: Any) -> tuple[Settings, str]:
    """Return the settings of a published model, keys below ``model``, and their place.

    Args:
        init_from: ``hf:NAME_OR_FOLDER[@REVISION]``.
        head: the head that is asked for, in any form of a config; None: the one that it was published with.

    Raises UserError when there is no config.json, it cannot be taken, or it has no head and none is asked for.
    """
    config = Source.of(init_from).config()
    if config.model_type == OWN:
        found = own_settings(config)
        if not _same_head(head, found["head"]):
            del found["head"]
        return found, config.where
    architecture = architecture_of(config)
    task = architecture.task()
    if task is None and head is None:
        names = config.get("architectures") or "(none)"
        raise UserError(Problem("model.head", f"must be set: {init_from} has no head that is known ({names})"))
    found = architecture.settings()
    if task is not None:
        same = next((own for own in (task.head, *task.others) if _same_head(head, own)), None)
        found = found if same is None else {**found, **task.settings, "head": same}
    return found, config.where


def _same_head(head: Any, published: Settings) -> bool:
    """Return whether a head that is asked for is the published one, perhaps with other arguments."""
    if head is None or (isinstance(head, Mapping) and not {"name", "class_path"} & head.keys()):
        return True
    try:
        return bool(registry.expand("head", head)["class_path"] == registry.expand("head", published)["class_path"])
    except UserError:  # the check of the whole config reports it
        return False


def with_arguments(published: Settings, head: Any) -> Any:
    """Return a head as it was published, with the arguments that are asked for in the place of its own."""
    if not isinstance(head, Mapping):
        return published
    named = head if {"name", "class_path"} & head.keys() else {**head, "name": published["name"]}
    whole, asked = (registry.expand("head", item) for item in (published, named))
    return {**whole, "init_args": {**whole.get("init_args", {}), **asked.get("init_args", {})}}


@dataclass(frozen=True)
class Published(Stored):
    """A published model, converted: every weight of it is to be taken, or belongs to a head."""

    adapter: Adapter | None = None
    """Adapters that are not merged."""


def starting_point(init_from: str | None, adapter: str | None, apart: bool) -> tuple[Stored, Tokenizer]:
    """Return the weights and the tokenizer that ``model.init_from`` means, of a checkpoint or a published model.

    Args:
        init_from: the key ``model.init_from``.
        adapter: the key ``model.adapter``.
        apart: whether the adapter is kept apart, and not merged.

    Raises UserError when a file is missing or damaged, or what is in it does not fit together.
    """
    if init_from is not None and is_published(init_from):
        return published(init_from, adapter, apart)
    if adapter is not None or init_from is None:
        raise UserError(Problem("model.adapter", "needs the model that it adapts: model.init_from: hf:NAME_OR_FOLDER"))
    return initial(init_from)


def published(init_from: str, adapter: str | None = None, apart: bool = False) -> tuple[Published, Tokenizer]:
    """Return a published model as a checkpoint would hold it, perhaps with an adapter, and its tokenizer.

    Raises UserError when a file is missing or damaged, or weights are missing or left over.
    """
    source = Source.of(init_from)
    config = source.config()
    if config.model_type == OWN:
        if adapter is not None:
            raise UserError(
                Problem("model.adapter", f"is for models of transformers' own, and {init_from} is llmkit's")
            )
        own = _own(source, config)
        return Published(own.path, own.content), restore_tokenizer(own.part, source.text)
    architecture = architecture_of(config)
    settings, task = architecture.settings(), architecture.task()
    theirs = _network_names(architecture, source.weights())
    adapts = None if adapter is None else read_adapter(adapter, architecture)
    if adapts is not None:
        theirs |= adapts.saved
        if not apart:
            adapts.merge(theirs)
    weights = [dataclasses.replace(weight, ours=f"net.{weight.ours}") for weight in architecture.weights()]
    state = take(weights, theirs, source.text)
    if state["net.embedding.weight"].shape != (settings["vocab_size"], settings["dim"]):
        shape = tuple(state["net.embedding.weight"].shape)
        raise UserError(f"{config.where} says {settings['vocab_size']} ids of width {settings['dim']}, not {shape}")
    state |= take(task.weights, theirs, source.text) if task else {}
    for known in architecture.tasks().values():  # other heads are taken as far as they are there
        there = [weight for weight in known.weights if all(part in theirs for part in weight.theirs)]
        state |= take(there, theirs, source.text)
    if left := [name for name in theirs if not re.fullmatch(architecture.of_heads, name)]:
        raise UserError(f"{source.text}: weights that nothing takes: {listed(left)}")
    tokenizer = _tokenizer(source)
    check_start(architecture, {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")})
    head = registry.expand("head", task.head) if task else None
    part = {
        "model": {key: _plain(key, value) for key, value in settings.items()} | ({"head": head} if head else {}),
        "tokenizer": registry.spec_of_instance(tokenizer),
        "tokenizer_state": tokenizer.to_state(),
        "head_info": task.info if task else {},
        "config": {},
    }
    kept = adapts if apart else None
    return Published(Path(init_from), {"llmkit": part, "state_dict": state}, kept), tokenizer


def own_checkpoint(name: str) -> Stored | None:
    """Return a folder of llmkit's own as the checkpoint that it was made from; None: it is of another architecture.

    Raises UserError when a file is missing or damaged.
    """
    source = Source.of(name)
    config = source.config()
    return _own(source, config) if config.model_type == OWN else None


def _own(source: Source, config: Config) -> Stored:
    return own_stored(source, config, None if source.file(STATE) else _tokenizer(source))


def _plain(key: str, value: Any) -> Any:
    family = registry.FAMILY_OF.get(f"model.{key}")
    return value if family is None else registry.expand(family, value)


def _network_names(architecture: Architecture, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefix, without masks, and without what is there a second time."""
    named = {name.removeprefix(architecture.prefix): value for name, value in weights.items()}
    named = {name: value for name, value in named.items() if not re.fullmatch(architecture.unused, name)}
    tied = architecture.settings()["tie_embeddings"]
    for copy, name in architecture.copies.items():
        if copy not in named or (copy == "lm_head.weight" and not tied):
            continue
        if not torch.equal(named[copy], named.setdefault(name, named[copy])):
            text = f"{copy} is not {name}, though its config.json says that they are tied"
            raise UserError(f"{architecture.config.source}: {text}")
        del named[copy]
    architecture.complete(named)
    return named


def _tokenizer(source: Source) -> Tokenizer:
    file = source.file("tokenizer.json") or (source.file("source.spm") and source.file("vocab.json"))
    if file is None:
        raise UserError(f"{source.text}: it has no tokenizer.json")
    source.file("tokenizer_config.json")  # next to it
    tokenizer: Tokenizer = registry.plugin("tokenizer", "pretrained", path=str(file.parent), as_published=True)()
    tokenizer.encode("a")
    return tokenizer


def check_fits_network(weights: Mapping[str, Tensor], stored: Published) -> None:
    """Raise UserError, with all of them, when weights of a network and of a published model do not fit each other.

    Args:
        weights: the network's, without memory perhaps.
        stored: the published model.
    """
    own = {f"net.{name}": value for name, value in weights.items()}
    theirs = stored.content["state_dict"]
    sides = [{name.split(".")[1] for name in names} & {"encoder", "decoder"} for names in (own, theirs)]
    if sides[0] != sides[1]:
        ours, its = (" and ".join(sorted(side)) for side in sides)
        raise UserError(Problem("model.head", f"needs a network with {ours}, but {stored.path} has {its}"))
    missing = [name for name in own if name not in theirs]
    left = [name for name in theirs if name.startswith("net.") and name not in own and name != "net.output_bias"]
    shapes = [
        f"{name} {tuple(theirs[name].shape)} there, {tuple(value.shape)} here"
        for name, value in own.items()
        if name in theirs and not _fits(name, value, theirs[name])
    ]
    found = {"it has no": missing, "nothing here takes": left, "of another shape:": shapes}
    if problems := [f"{what} {listed(names)}" for what, names in found.items() if names]:
        raise UserError(Problem(KEY, f"{stored.path} does not fit this model: {'; '.join(problems)}"))


TABLES = ("net.position.table.weight", "net.decoder_position.table.weight")


def _fits(name: str, own: Tensor, theirs: Tensor) -> bool:
    """Return whether a weight can be taken: of a table of positions its first rows are enough."""
    if name in TABLES and own.shape[1:] == theirs.shape[1:]:
        return len(own) <= len(theirs)
    return own.shape == theirs.shape


@torch.no_grad()
def begin(own: Mapping[str, Tensor], spec: Mapping[str, Any], stored: Stored) -> str:
    """Copy the weights that a run begins with into those of a built model; returns what was taken, in words.

    Of a checkpoint all are taken that fit. Of a published model every weight of the network is, or it is an error;
    weights of its head are where they fit, and those of a head that it does not have begin at random.
    """
    if not isinstance(stored, Published):
        return take_weights(own, spec, stored)
    theirs = stored.content["state_dict"]
    taken = [name for name, value in own.items() if name in theirs and _fits(name, value, theirs[name])]
    for name in taken:
        own[name].copy_(theirs[name][: len(own[name])])
    new = [name for name in own if name not in taken]
    left = [name for name in theirs if name not in taken]
    text = f"{KEY} {stored.path}: {len(taken)} weights taken, and its tokenizer"
    text += f"; new, of the head: {listed(new)}" if new else ""
    return text + (f"; left out, of its head: {listed(left)}" if left else "")
