"""The same language model by other libraries: pre-norm decoder, GPT-2's shape, weights tied where they can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a language model and of its batches."""

    layers: int
    dim: int
    heads: int
    context: int
    batch: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.layers}L {self.dim} wide, context {self.context}, batch {self.batch}, vocabulary {self.vocab}"


Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes ids and targets, (B, T); returns the mean loss."""


def litgpt(shape: Shape) -> tuple[nn.Module, Loss]:
    """LitGPT's GPT: rotary positions, GELU, LayerNorm; its own chunked loss is the one of its recipes."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        name="bench",
        block_size=shape.context,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.dim,
        bias=False,
        parallel_residual=False,
        rotary_percentage=1.0,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    _normal(model)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # The recipes' call (litgpt.pretrain): chunk_size 0.
        found: Tensor = chunked_cross_entropy(model(ids), targets, chunk_size=0)
        return found

    return model, loss


def x_transformers(shape: Shape) -> tuple[nn.Module, Loss]:
    """x-transformers with rotary positions and its fast attention."""
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=shape.vocab,
        max_seq_len=shape.context,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_layers=Decoder(
            dim=shape.dim,
            depth=shape.layers,
            heads=shape.heads,
            attn_dim_head=shape.dim // shape.heads,
            rotary_pos_emb=True,
            attn_flash=True,
        ),
    )
    _normal(model)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    return model, loss


def gpt2(shape: Shape) -> tuple[nn.Module, Loss]:
    """Hugging Face's GPT-2, attention by scaled_dot_product_attention, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.dim,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    model: Any = GPT2LMHeadModel(config)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = model(ids, labels=ids, shift_labels=targets, use_cache=False).loss
        return found

    return model, loss


def encoder(shape: Shape) -> tuple[nn.Module, Loss]:
    """torch.nn.TransformerEncoder with a causal mask and learned positions."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape.vocab, shape.dim)
            self.positions = nn.Parameter(torch.randn(shape.context, shape.dim) * 0.02)
            layer = nn.TransformerEncoderLayer(
                shape.dim, shape.heads, 4 * shape.dim, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
            )
            self.layers = nn.TransformerEncoder(
                layer, shape.layers, nn.LayerNorm(shape.dim, bias=False), enable_nested_tensor=False
            )
            mask = nn.Transformer.generate_square_subsequent_mask(shape.context)
            self.register_buffer("mask", mask, persistent=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids) + self.positions[: ids.shape[1]]
            length = ids.shape[1]
            mask = self.mask[:length, :length]  # type: ignore[index]
            return F.linear(self.layers(x, mask=mask, is_causal=True), self.embedding.weight)

    model = Model()
    nn.init.normal_(model.embedding.weight, std=0.02)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    return model, loss


def _normal(model: nn.Module) -> None:
    """Start from GPT-2's small weights: embeddings of N(0, 1) tied to the output make large, slow numbers."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


PEERS: dict[str, Callable[[Shape], tuple[nn.Module, Loss]]] = {
    "litgpt": litgpt,
    "nn.TransformerEncoder": encoder,
    "x-transformers": x_transformers,
    "HF GPT-2": gpt2,
}
