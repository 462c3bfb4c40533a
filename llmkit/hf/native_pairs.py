"""Encoder-decoders of ours as those of transformers: Marian, BART, T5."""

from __future__ import annotations

import math
from typing import Any

from llmkit.contracts import Tokenizer
from llmkit.hf.facts import Facts, NoCounterpartError

Content = dict[str, Any]
"""A config.json, or a generation_config.json."""


def sequence_to_sequence(facts: Facts, start: list[str]) -> Content:
    """Return the config.json of an encoder-decoder.

    Args:
        facts: what the network is.
        start: the tokens that the decoder begins with.

    Raises NoCounterpartError when transformers has none like it.
    """
    attends = facts.alike
    if attends is None or attends.num_kv_heads != attends.num_heads or attends.qk_norm or attends.window:
        raise NoCounterpartError("this attention in an encoder-decoder (all have multi_head without qk_norm)")
    if facts.cross != attends:
        raise NoCounterpartError("a cross-attention that is not like the attention")
    if facts.sizes["token_types"]:
        raise NoCounterpartError("token_types in an encoder-decoder")
    found = {"relative": _t5, "sinusoidal": _marian, "learned": _bart}.get(facts.position)
    if found is None:
        raise NoCounterpartError(f"the position {facts.position} in an encoder-decoder")
    content = found(facts, start)
    common = {"vocab_size": facts.vocab_size, "d_model": facts.sizes["dim"], "is_encoder_decoder": True}
    return {**content, **common, "forced_eos_token_id": None}


def _layers(facts: Facts, name: str) -> Content:
    """Return what Marian and BART share. Raises NoCounterpartError for what neither of them has."""
    sizes, attends = facts.sizes, facts.layers[0]
    if facts.norm != "layer" or facts.eps != 1e-5 or not facts.norm_bias or sizes["norm_first"]:
        raise NoCounterpartError(f"these norms ({name}: layer with eps 1e-5 and biases, norm_first false)")
    if facts.gated or not facts.feedforward_bias or attends.bias is not True:
        raise NoCounterpartError(f"these parts ({name}: a feedforward without gates, biases everywhere)")
    if attends.scale is not None or attends.num_heads * attends.head_dim != sizes["dim"]:
        raise NoCounterpartError(f"a scale or head_dim of its own ({name} has none)")
    if not sizes["tie_embeddings"] or not sizes["output_bias"] or sizes["output_scale"] != 1:
        raise NoCounterpartError(f"these outputs ({name}: tie_embeddings and output_bias, no output_scale)")
    sides = {"attention_heads": attends.num_heads, "ffn_dim": facts.hidden}
    return {
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()},
        "encoder_layers": sizes["num_layers"],
        "decoder_layers": sizes["decoder_layers"],
        "activation_function": facts.activation,
        "max_position_embeddings": sizes["context"],
        "tie_word_embeddings": True,
    }


def _marian(facts: Facts, start: list[str]) -> Content:
    sizes, given = facts.sizes, facts.arguments
    if given["layout"] != "halves" or sizes["embedding_norm"] or sizes["embedding_scale"] != 1 or len(start) > 1:
        text = "no embedding_norm and embedding_scale, a single token to start with"
        raise NoCounterpartError(f"this beginning (Marian: sinusoidal positions in halves, {text})")
    names = {"model_type": "marian", "architectures": ["MarianMTModel"]}
    return {**names, **_layers(facts, "Marian"), "scale_embedding": given["scale"]}


def _bart(facts: Facts, start: list[str]) -> Content:
    sizes, scale = facts.sizes, math.sqrt(facts.sizes["dim"])
    begins = sizes["embedding_norm"] and sizes["separate_positions"] and sizes["embedding_scale"] in (1, scale)
    if not begins or start[1:] not in ([], ["bos"]) or (len(start) == 1 and start != ["bos"]):
        text = "embedding_norm, separate_positions, embedding_scale 1 or the root of dim, start [eos, bos] or [bos]"
        raise NoCounterpartError(f"this beginning (BART: {text})")
    names = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
    return {**names, **_layers(facts, "BART"), "scale_embedding": scale == sizes["embedding_scale"]}


def _t5(facts: Facts, start: list[str]) -> Content:
    sizes, attends = facts.sizes, facts.layers[0]
    if facts.norm != "rms" or not sizes["norm_first"] or facts.feedforward_bias or attends.bias or sizes["output_bias"]:
        raise NoCounterpartError("these parts with relative positions (T5: rms norms first, no biases)")
    if attends.scale != 1 or sizes["embedding_scale"] != 1 or sizes["embedding_norm"] or len(start) > 1:
        text = "scale 1, no embedding_norm and embedding_scale, a single token to start with"
        raise NoCounterpartError(f"this beginning or attention with relative positions (T5: {text})")
    if sizes["output_scale"] != (sizes["dim"] ** -0.5 if sizes["tie_embeddings"] else 1):
        text = "output_scale 1 / sqrt(dim) with tie_embeddings, and 1 without"
        raise NoCounterpartError(f"these outputs with relative positions (T5: {text})")
    activation = {("gelu_new", True): "gelu"}.get((facts.activation, facts.gated), facts.activation)
    if facts.gated and facts.activation == "gelu":
        raise NoCounterpartError("a gated gelu without the approximation tanh (T5 has that)")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_kv": attends.head_dim,
        "d_ff": facts.hidden,
        "num_layers": sizes["num_layers"],
        "num_decoder_layers": sizes["decoder_layers"],
        "num_heads": attends.num_heads,
        "relative_attention_num_buckets": facts.arguments["buckets"],
        "relative_attention_max_distance": facts.arguments["max_distance"],
        "layer_norm_epsilon": facts.eps,
        "feed_forward_proj": f"gated-{activation}" if facts.gated else activation,
        "tie_word_embeddings": sizes["tie_embeddings"],
        "n_positions": sizes["context"],
    }


def start_of(tokenizer: Tokenizer, start: list[str]) -> Content:
    """Return what a generation config says of the first tokens that a decoder reads.

    Args:
        tokenizer: gives each role its id.
        start: the roles, at most two; a second one is bos.
    """
    first, *forced = (getattr(tokenizer, f"{role}_id") for role in start)
    return {"decoder_start_token_id": first, **({"forced_bos_token_id": forced[0]} if forced else {})}
