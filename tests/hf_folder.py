"""Folders in the format of Hugging Face, written without transformers: a tiny GPT-2 and a tiny BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from llmkit import LanguageModel, plugin
from llmkit.hf.encoders import Bert
from llmkit.hf.folder import Config
from llmkit.hf.mapping import give

DIM, LAYERS, HEADS, CONTEXT, ROWS = 8, 2, 2, 24, 60


def config(**changes: Any) -> dict[str, Any]:
    sizes = {"n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": ROWS}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, **changes}


def weights() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (ROWS, DIM), "wpe.weight": (CONTEXT, DIM)}
    maps = {"attn.c_attn": 3 * DIM, "attn.c_proj": DIM, "mlp.c_fc": 4 * DIM, "mlp.c_proj": DIM}
    for norm in ("ln_f", *(f"h.{i}.ln_{n}" for i in range(LAYERS) for n in (1, 2))):
        shapes |= {f"{norm}.weight": (DIM,), f"{norm}.bias": (DIM,)}
    for layer in range(LAYERS):
        for name, width in maps.items():
            inputs = 4 * DIM if name == "mlp.c_proj" else DIM
            shapes |= {f"h.{layer}.{name}.weight": (inputs, width), f"h.{layer}.{name}.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write(folder: Path, **changes: Any) -> Path:
    """Write config, weights and a tokenizer of letters; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    save_file(weights(), folder / "model.safetensors")
    write_tokenizer(folder, ["<unk>", "<|endoftext|>"], eos_token="<|endoftext|>")
    return folder


def write_tokenizer(folder: Path, specials: list[str], around: str = "", **roles: str) -> None:
    """Write a tokenizer of 58 ids, letters but for the special tokens."""
    vocab = {token: number for number, token in enumerate([*specials, *map(chr, range(65, 123))][:58])}
    unknown = next(token for token in specials if "unk" in token.lower())
    hf = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    hf.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    hf.decoder = decoders.Fuse()
    hf.add_special_tokens(specials)
    if around:
        hf.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(token, vocab[token]) for token in specials if token in around]
        )
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def write_bert(folder: Path) -> Path:
    """Write a BERT of one layer, without a head; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": 16}
    content = {"model_type": "bert", "architectures": ["BertModel"], **sizes, "vocab_size": ROWS}
    content["max_position_embeddings"] = 128
    (folder / "config.json").write_text(json.dumps(content))
    bert = Bert(Config("test", content))
    tokenizer = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    write_tokenizer(folder, tokenizer, "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    model = LanguageModel(head=plugin("head", "masked_lm"), **bert.settings())
    model.tokenizer = plugin("tokenizer", "pretrained", path=str(folder), as_published=True)()
    model.configure_model()
    save_file(give([*bert.weights()], model.network.state_dict(), {}), folder / "model.safetensors")
    return folder
