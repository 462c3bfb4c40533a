"""A model of ours as one of transformers' own architectures, where its parts are those of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmkit.hf.architecture import Architecture, classes
from llmkit.hf.facts import Facts, NoCounterpartError, facts_of, part
from llmkit.hf.folder import Config
from llmkit.hf.mapping import give
from llmkit.hf.native_pairs import sequence_to_sequence
from llmkit.hf.start import architecture_of

Content = dict[str, Any]
"""A config.json."""


def native(
    spec: Mapping[str, Any], state: Mapping[str, Tensor], labels: list[str]
) -> tuple[Content, dict[str, Tensor]]:
    """Return the config.json of a model and its weights, by transformers' names.

    Args:
        spec: the description of the model, as a checkpoint has it.
        state: its weights: ``net.`` and ``head.``.
        labels: the names of a classifier's labels.

    Raises NoCounterpartError, with the reason, when parts or head are not those of an architecture of transformers.
    """
    head, given = part("head", spec["head"])
    try:
        if spec.get("mup_base_dim") not in (None, spec["dim"]):
            raise NoCounterpartError("the output multiplier of mup_base_dim")
        facts = facts_of(spec, state)
        content = _content(facts, head, given)
    except NoCounterpartError as error:
        raise NoCounterpartError(f"transformers has no architecture with {error}") from error
    content |= classes(head, labels)
    rate = spec["dropout"]
    content |= dict.fromkeys(_DROPOUT[content["model_type"]], rate)
    architecture = architecture_of(Config("the export", content))
    back = facts_of(_settings(architecture), state)
    if back != facts:
        raise AssertionError(f"{content['model_type']} would be another model: {back} instead of {facts}")
    return content, _weights(architecture, state, facts)


_DROPOUT: dict[str, tuple[str, ...]] = {
    "gpt2": ("resid_pdrop", "embd_pdrop"),
    "bert": ("hidden_dropout_prob",),
    "distilbert": ("dropout",),
    **dict.fromkeys(("marian", "bart"), ("dropout",)),
    "t5": ("dropout_rate",),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ()),
}


def _settings(architecture: Architecture) -> dict[str, Any]:
    task = architecture.task()
    plain: dict[str, Any] = {"embedding_norm": False, "token_types": 0, "output_bias": False, "decoder_layers": None}
    plain |= {"separate_positions": False, "embedding_scale": 1.0, "output_scale": 1.0}
    return {**plain, **architecture.settings(), **(task.settings if task else {})}


def _content(facts: Facts, head: str, given: Mapping[str, Any]) -> Content:
    sizes = facts.sizes
    if head in ("translation", "summarization"):
        return sequence_to_sequence(facts, given["start"] or ["bos"])
    if facts.layers[0].scale is not None or sizes["embedding_scale"] != 1 or sizes["output_scale"] != 1:
        raise NoCounterpartError("a scale of scores, embedding_scale or output_scale in a network with one stack")
    if head in ("generation", "completion"):
        if not sizes["norm_first"] or any(sizes[key] for key in ("embedding_norm", "token_types", "output_bias")):
            raise NoCounterpartError("post-norms, embedding_norm, token_types or output_bias in a decoder")
        return _gpt2(facts) if facts.position == "learned" else _llama(facts)
    if head in ("masked_lm", "classification", "multi_label"):
        return _bert(facts, head, given)
    raise NoCounterpartError(f"the head {head} as it is here")


def _gpt2(facts: Facts) -> Content:
    attends = facts.alike
    if attends is None or attends.num_kv_heads != attends.num_heads or attends.qk_norm or attends.window:
        raise NoCounterpartError("learned positions and this attention (GPT-2 has multi_head without qk_norm)")
    _need(facts, "GPT-2", layer_norm=True, biases=attends.bias is True)
    _whole(facts, "GPT-2")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": facts.sizes["dim"],
        "n_head": attends.num_heads,
        "n_layer": facts.sizes["num_layers"],
        "n_positions": facts.sizes["context"],
        "n_inner": facts.hidden,
        "activation_function": facts.activation,
        "layer_norm_epsilon": facts.eps,
        "vocab_size": facts.vocab_size,
        "tie_word_embeddings": facts.sizes["tie_embeddings"],
    }


def _need(facts: Facts, name: str, layer_norm: bool, biases: bool) -> None:
    """Refuse what two of the three architectures with biases everywhere do not have. Raises NoCounterpartError."""
    if (facts.norm == "layer") != layer_norm or facts.gated or not facts.feedforward_bias or not biases:
        raise NoCounterpartError(f"these parts ({name}: layer norms, a feedforward without gates, biases everywhere)")
    if not facts.norm_bias:
        raise NoCounterpartError(f"layer norms without biases ({name} has them)")


def _whole(facts: Facts, name: str) -> None:
    attends = facts.layers[0]
    if attends.num_heads * attends.head_dim != facts.sizes["dim"]:
        raise NoCounterpartError(f"a head_dim of its own ({name} divides its width)")


def _llama(facts: Facts) -> Content:
    first = facts.layers[0]
    if facts.norm != "rms" or not facts.gated:
        raise NoCounterpartError(
            "rotary positions without rms norms and a gated feedforward (Llama has rms and swiglu)"
        )
    windows = [layer.window for layer in facts.layers]
    without = {dataclasses.replace(layer, window=None) for layer in facts.layers}
    if len(without) > 1 or len(set(filter(None, windows))) > 1:
        raise NoCounterpartError("layers whose attention differs in more than having a window")
    if first.qk_norm:
        if facts.eps != 1e-6:
            raise NoCounterpartError("normalised queries and keys and another eps of the norms than 1e-6")
        kind = "qwen3"
    elif first.bias == "qkv":
        kind = "qwen2"
    else:
        kind = "mistral" if all(windows) else "llama"
    only_some = any(windows) and kind == "llama"
    if only_some or (kind == "mistral" and first.bias) or (first.bias == "qkv" and kind != "qwen2"):
        raise NoCounterpartError(f"these windows and biases together (window {windows}, bias {first.bias})")
    if facts.feedforward_bias and kind != "llama":
        raise NoCounterpartError(f"biases in the feedforward, which {kind} does not have")
    placed = facts.arguments
    rope: Content = {"rope_type": "default", **(placed["scaling"] or {}), "rope_theta": placed["base"]}
    content: Content = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": facts.sizes["dim"],
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "num_hidden_layers": facts.sizes["num_layers"],
        "intermediate_size": facts.hidden,
        "hidden_act": facts.activation,
        "rms_norm_eps": facts.eps,
        "max_position_embeddings": facts.sizes["context"],
        "rope_parameters": rope,
        "vocab_size": facts.vocab_size,
        "tie_word_embeddings": facts.sizes["tie_embeddings"],
    }
    if kind in ("llama", "qwen3"):
        content["attention_bias"] = bool(first.bias)
    if kind == "llama":
        content["mlp_bias"] = facts.feedforward_bias
    if kind != "llama":
        content["sliding_window"] = next(filter(None, windows), None)
    if kind in ("qwen2", "qwen3"):
        content["use_sliding_window"] = any(windows)
        content["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return content


def _bert(facts: Facts, head: str, given: Mapping[str, Any]) -> Content:
    sizes, attends = facts.sizes, facts.alike
    if sizes["norm_first"] or not sizes["embedding_norm"] or facts.position != "learned":
        raise NoCounterpartError(
            "these norms or positions in an encoder (BERT: norm_first false, embedding_norm, learned)"
        )
    if attends is None or attends.num_kv_heads != attends.num_heads or attends.qk_norm or attends.window:
        raise NoCounterpartError("this attention in an encoder (BERT has multi_head without qk_norm)")
    _need(facts, "BERT", layer_norm=True, biases=attends.bias is True)
    _whole(facts, "BERT")
    if not sizes["tie_embeddings"]:
        raise NoCounterpartError("an output matrix of its own in an encoder")
    masked = head == "masked_lm"
    if masked and not (given["transform"] and given["norm_eps"] == facts.eps and sizes["output_bias"]):
        raise NoCounterpartError("a masked_lm without transform, norm_eps as in the norms, and output_bias")
    if not masked and (given["pool"] != "pooler" or sizes["output_bias"]):
        raise NoCounterpartError(f"a {head} with pool: {given['pool']} (BERT has pool: pooler)")
    if not sizes["token_types"]:
        return _distilbert(facts, masked)
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if masked else "BertForSequenceClassification"],
        "hidden_size": sizes["dim"],
        "num_attention_heads": attends.num_heads,
        "num_hidden_layers": sizes["num_layers"],
        "intermediate_size": facts.hidden,
        "hidden_act": facts.activation,
        "layer_norm_eps": facts.eps,
        "max_position_embeddings": sizes["context"],
        "type_vocab_size": sizes["token_types"],
        "vocab_size": facts.vocab_size,
    }


def _distilbert(facts: Facts, masked: bool) -> Content:
    if facts.eps != 1e-12 or not masked:
        raise NoCounterpartError("an encoder without token types but for DistilBERT's, with a masked_lm and eps 1e-12")
    return {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM"],
        "dim": facts.sizes["dim"],
        "n_heads": facts.layers[0].num_heads,
        "n_layers": facts.sizes["num_layers"],
        "hidden_dim": facts.hidden,
        "activation": facts.activation,
        "max_position_embeddings": facts.sizes["context"],
        "vocab_size": facts.vocab_size,
    }


def _weights(architecture: Architecture, state: Mapping[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """Return the weights by transformers' names. Of tied ones there is one."""
    ours = dict(state)
    for name in state:  # one scale for queries and keys is two equal ones
        if name.endswith(".qk_scale") and name.replace("qk_scale", "k_scale") not in state:
            ours[name.replace(".qk_scale", ".k_scale")] = state[name]
    weights = [dataclasses.replace(weight, ours=f"net.{weight.ours}") for weight in architecture.weights()]
    maps = [weight.ours.rpartition(".")[0] for weight in weights if len(weight.theirs) == 3]
    queries = [(layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim) for layer in facts.layers]
    sizes = {name: [*queries[int(name.split(".")[2])], queries[int(name.split(".")[2])][1]] for name in maps}
    task = architecture.task()
    assert task is not None
    found = give(weights, ours, sizes) | give(task.weights, ours, {})
    of_head = {name for weight in task.weights for name in weight.theirs if not name.startswith("pooler.")}
    of_head |= architecture.outside
    found = {name if name in of_head else f"{architecture.prefix}{name}": value for name, value in found.items()}
    taken = {weight.ours for weight in (*weights, *task.weights)}
    if left := [name for name in state if name not in taken]:
        raise AssertionError(f"weights that were not written: {left}")
    return found
