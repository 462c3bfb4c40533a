"""Tiny random models of transformers' own classes, every parameter scrambled, with a tokenizer of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

VOCAB = 61
ROWS = 64
"""Rows of the embedding: a few more than the tokenizer has ids."""

LLAMA: dict[str, Any] = {
    **{"vocab_size": ROWS, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
BERT: dict[str, Any] = {
    **{"vocab_size": ROWS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 40, "max_position_embeddings": 32},
}
GPT2: dict[str, Any] = {
    **{"vocab_size": ROWS, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
DISTILBERT: dict[str, Any] = {
    **{"vocab_size": ROWS, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 32}
}
ROBERTA: dict[str, Any] = {
    **BERT,
    **{"type_vocab_size": 1, "max_position_embeddings": 34, "pad_token_id": 1, "layer_norm_eps": 1e-5},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied, exact gelu": (
        "GPT2LMHeadModel",
        {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama with biases, head_dim, tied": (
        "LlamaForCausalLM",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama3 scaling": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3}),
    "linear scaling": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LINEAR}),
    "yarn": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 8}),
    "mistral without a window": ("MistralForCausalLM", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2 with windows in the last layer": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**BERT, "id2label": {0: "bad", 1: "fair", 2: "good"}}),
    "roberta": ("RobertaForSequenceClassification", {**ROBERTA, "id2label": {0: "bad", 1: "fair", 2: "good"}}),
}


_SIDES: dict[str, Any] = {
    **{"vocab_size": ROWS, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
    "forced_eos_token_id": None,
}
MARIAN: dict[str, Any] = {
    **_SIDES,
    **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "activation_function": "swish"},
}
BART: dict[str, Any] = {**_SIDES, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
T5: dict[str, Any] = {
    **{"vocab_size": ROWS, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2},
    **{"num_heads": 4, "decoder_start_token_id": 0, "eos_token_id": 2},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("MarianMTModel", {**MARIAN, "scale_embedding": True}),
    "marian with relu": ("MarianMTModel", {**MARIAN, "activation_function": "relu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart with a scale": ("BartForConditionalGeneration", {**BART, "scale_embedding": True}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 1.1": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    ),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "num_layers": 1}),
}


def build(name: str, settings: dict[str, Any]) -> Any:
    """Return a model of a class, with every parameter scrambled."""
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**settings)).eval()
    untied = name.startswith("T5") and not settings.get("tie_word_embeddings", True)
    if untied or name.startswith("MT5"):  # what transformers 5 does at loading
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(1)
    done: set[int] = set()
    with torch.no_grad():
        learned = [(weight, value) for weight, value in model.named_parameters() if value.requires_grad]
        biases = [(weight, value) for weight, value in model.named_buffers() if weight == "final_logits_bias"]
        for weight, parameter in (*learned, *biases):  # not Marian's sines
            if parameter.data_ptr() not in done:
                done.add(parameter.data_ptr())
                scale = ("norm" in weight.lower() or ".ln_" in weight) and weight.endswith("weight")
                parameter.copy_(float(scale) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write a tokenizer of ``kind`` ``bert`` ([CLS] x [SEP]), ``roberta``, ``llama`` (bos x), ``gpt2`` or ``t5``."""
    names = {
        "bert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "llama": ["<pad>", "<s>", "</s>", "<unk>", "<odd>"],
        "t5": ["<pad>", "<odd>", "</s>", "<unk>", "<extra_id_0>"],
        "gpt2": ["<odd>", "<|im_start|>", "<|im_end|>", "<unk>", "<other>"],
    }[kind]
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {token: number for number, token in enumerate([*names, *letters][:VOCAB])}
    hf = Tokenizer(models.WordPiece(vocab, unk_token=names[3], max_input_chars_per_word=100))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.decoder = decoders.WordPiece()
    hf.add_special_tokens(names)
    roles: dict[str, str] = {}
    if kind == "bert":
        roles = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
        hf.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        hf.enable_padding(length=12)  # published files have that, and it is not part of the ids
    elif kind == "roberta":
        roles = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
        hf.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    elif kind == "llama":
        roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
        hf.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    elif kind == "t5":
        roles = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
        hf.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    else:
        roles = {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    hf.save(str(folder / "tokenizer.json"))
    config = {f"{role}_token": token for role, token in roles.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save(folder: Path, name: str, settings: dict[str, Any], **how: Any) -> Any:
    """Write a model with a tokenizer into a folder; returns the model."""
    model = build(name, settings)
    model.save_pretrained(folder, **how)
    kinds = {"Bert": "bert", "Dist": "bert", "Robe": "roberta", "GPT2": "gpt2"}
    kinds |= {"Mari": "t5", "T5Fo": "t5", "MT5F": "t5", "Bart": "roberta"}
    write_tokenizer(folder, kinds.get(name[:4], "llama"))
    return model
