"""Encoder-decoders: Marian, BART, T5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.hf.architecture import Architecture, Settings, Task
from llmkit.hf.folder import Config
from llmkit.hf.mapping import Weight, linear


class SequenceToSequence(Architecture):
    """What encoder-decoders have in common: a text that is read, and one that is written after a first token."""

    usual: ClassVar[dict[str, int | None]]
    """The ids of the roles in a config.json that does not say them."""

    @property
    def roles(self) -> dict[str, int]:
        """The ids that its config.json gives to roles."""
        found = {role: self.config.content.get(f"{role}_token_id", self.usual[role]) for role in ("eos", "pad", "bos")}
        return {role: number for role, number in found.items() if type(number) is int}

    @property
    def start(self) -> list[str]:
        """The roles of the tokens that the decoder reads before a text. Raises UserError for one of no known role."""
        number = self.config.get("decoder_start_token_id")
        number = self.usual["start"] if number is None else number
        for role in ("pad", "eos", "bos"):
            if self.roles.get(role) == number:
                return [role]
        raise self.config.refuse(
            f"whose decoder begins with the id {number!r:.60}, which is not pad, eos or bos, is not supported"
        )

    def head(self, name: str) -> Settings:
        """Return a head that writes after the tokens of ``start``."""
        return {"name": name, "start": self.start}

    def written_by(self, first: str, second: str) -> Task:
        """Return a task that either of two heads does, the first one unless the other is asked for."""
        return Task(self.head(first), others=(self.head(second),))


class Marian(SequenceToSequence):
    """Marian's translators as transformers has them (Junczys-Dowmunt et al. 2018, arXiv:1804.00344)."""

    prefix = "model."
    unused = r"(encoder|decoder)\.embed_positions\.weight"
    outside = frozenset({"final_logits_bias"})
    copies: ClassVar[dict[str, str]] = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    )
    usual: ClassVar[dict[str, int | None]] = {"eos": 0, "pad": 58100, "bos": None, "start": 58100}

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        if not c.flag("share_encoder_decoder_embeddings", True):
            raise c.refuse("with embeddings of its own on each side is not supported")
        return {
            **self._layers(),
            "position": {"name": "sinusoidal", "layout": "halves", "scale": c.flag("scale_embedding")},
        }

    def _layers(self) -> Settings:
        """Return the settings that BART has too. Raises UserError for sides that differ in more than their depth."""
        c = self.config
        for name in ("attention_heads", "ffn_dim"):
            if c.size(f"encoder_{name}") != c.size(f"decoder_{name}"):
                raise c.refuse(f"with different encoder_{name} and decoder_{name} is not supported")
        if not c.flag("tie_word_embeddings", True):
            raise c.refuse("with an output matrix of its own is not supported")
        attention = {
            **{"name": "multi_head", "num_heads": c.size("encoder_attention_heads"), "qk_norm": False, "bias": True}
        }
        activation = str(c.get("activation_function") or "gelu")
        return {
            "attention": attention,
            "cross_attention": attention,
            "feedforward": self.feedforward(activation, c.size("encoder_ffn_dim"), bias=True),
            "norm": {"name": "layer", "eps": 1e-5, "bias": True},
            "norm_first": False,
            "dim": c.size("d_model"),
            "num_layers": c.layers("encoder_layers"),
            "decoder_layers": c.layers("decoder_layers"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": True,
            "output_bias": True,
            "context": c.size("max_position_embeddings"),
        }

    def complete(self, weights: dict[str, Tensor]) -> None:
        """Add the output bias, which a folder need not have."""
        weights.setdefault("final_logits_bias", torch.zeros(1, self.config.size("vocab_size")))

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield Weight("embedding.weight", ("shared.weight",))
        yield Weight("output_bias", ("final_logits_bias",), row=True)
        for side in ("encoder", "decoder"):
            for i in range(self.config.layers(f"{side}_layers")):
                ours, theirs = f"{side}.{i}", f"{side}.layers.{i}"
                yield from linear(f"{ours}.attention.qkv", *(f"{theirs}.self_attn.{name}_proj" for name in "qkv"))
                yield from linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
                yield from linear(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm")
                if side == "decoder":
                    yield from linear(f"{ours}.cross.q", f"{theirs}.encoder_attn.q_proj")
                    yield from linear(f"{ours}.cross.kv", *(f"{theirs}.encoder_attn.{name}_proj" for name in "kv"))
                    yield from linear(f"{ours}.cross.out", f"{theirs}.encoder_attn.out_proj")
                    yield from linear(f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm")
                yield from linear(f"{ours}.feedforward.inner", f"{theirs}.fc1")
                yield from linear(f"{ours}.feedforward.out", f"{theirs}.fc2")
                yield from linear(f"{ours}.feedforward_norm", f"{theirs}.final_layer_norm")

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"MarianMTModel": self.written_by("translation", "summarization")}


class Bart(Marian):
    """BART (Lewis et al. 2019, arXiv:1910.13461). Its position tables begin with two rows that no position has."""

    unused = r"(?!)"
    of_heads = r"(classification_head|qa_outputs)\..*"
    usual: ClassVar[dict[str, int | None]] = {"eos": 2, "pad": 1, "bos": 0, "start": 2}

    @property
    def start(self) -> list[str]:
        """The roles of the tokens before a text: after the first one comes bos, as in all that BART was trained on."""
        first = super().start
        return first if first == ["bos"] or "bos" not in self.roles else [*first, "bos"]

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        scale = math.sqrt(c.size("d_model")) if c.flag("scale_embedding") else 1.0
        return {
            **self._layers(),
            "position": {"name": "learned"},
            "separate_positions": True,
            "embedding_norm": True,
            "embedding_scale": scale,
        }

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield from super().weights()
        for side, ours in (("encoder", ""), ("decoder", "decoder_")):
            yield Weight(f"{ours}position.table.weight", (f"{side}.embed_positions.weight",), skip=2)
            yield from linear(f"{ours}embedding_norm", f"{side}.layernorm_embedding")

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"BartForConditionalGeneration": self.written_by("summarization", "translation")}


class T5(SequenceToSequence):
    """T5 (Raffel et al. 2020, arXiv:1910.10683), and version 1.1 with its gated feedforward (Shazeer 2020).

    Version 1.1 has an output matrix of its own and does not scale the states before it; a config.json says the latter,
    by ``scale_decoder_outputs`` or by ``tie_word_embeddings``, and from it follows the former.
    """

    prefix = ""
    unused = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    copies: ClassVar[dict[str, str]] = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    )
    usual: ClassVar[dict[str, int | None]] = {"eos": 1, "pad": 0, "bos": None, "start": 0}

    usual_feedforward = "relu"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scaled = config.flag("scale_decoder_outputs", config.flag("tie_word_embeddings", True))

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        dim = c.size("d_model")
        activation, gated = self._activation
        attention = {
            **{"name": "multi_head", "num_heads": c.size("num_heads"), "head_dim": c.size("d_kv", 64)},
            **{"qk_norm": False, "bias": False, "scale": 1.0},
        }
        position = {
            "name": "relative",
            "buckets": c.size("relative_attention_num_buckets", 32),
            "max_distance": c.size("relative_attention_max_distance", 128),
        }
        return {
            "attention": attention,
            "cross_attention": attention,
            "position": position,
            "feedforward": self.feedforward(activation, c.size("d_ff"), bias=False, gated=gated),
            "norm": {"name": "rms", "eps": c.number("layer_norm_epsilon", 1e-6)},
            "norm_first": True,
            "dim": dim,
            "num_layers": c.layers("num_layers"),
            "decoder_layers": self._depth("decoder"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": self.scaled,
            "output_scale": dim**-0.5 if self.scaled else 1.0,
            "context": c.size("n_positions", 512),
        }

    def _depth(self, side: str) -> int:
        own = side == "decoder" and self.config.get("num_decoder_layers") is not None
        return self.config.layers("num_decoder_layers" if own else "num_layers")

    @property
    def _activation(self) -> tuple[str, bool]:
        """The activation function, and whether it is a gate."""
        name = str(self.config.get("feed_forward_proj") or self.usual_feedforward)
        gated = name.startswith("gated-")
        return ("gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")), gated

    def complete(self, weights: dict[str, Tensor]) -> None:
        """Add the output matrix of a model that does not scale, where it is the embedding matrix."""
        if not self.scaled and "shared.weight" in weights:
            weights.setdefault("lm_head.weight", weights["shared.weight"])

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield Weight("embedding.weight", ("shared.weight",))
        if not self.scaled:
            yield Weight("output.weight", ("lm_head.weight",))
        inner = ("wi_0", "wi_1") if self._activation[1] else ("wi",)
        for side, ours in (("encoder", ""), ("decoder", "decoder_")):
            table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            yield Weight(f"{ours}position.table.weight", (table,))
            for i in range(self._depth(side)):
                own, theirs = f"{side}.{i}", f"{side}.block.{i}.layer"
                yield from self._attention(f"{own}.attention", f"{theirs}.0")
                if side == "decoder":
                    yield from self._attention(f"{own}.cross", f"{theirs}.1")
                last = f"{theirs}.{2 if side == 'decoder' else 1}"
                yield from linear(
                    f"{own}.feedforward.inner", *(f"{last}.DenseReluDense.{name}" for name in inner), bias=False
                )
                yield from linear(f"{own}.feedforward.out", f"{last}.DenseReluDense.wo", bias=False)
                yield from linear(f"{own}.feedforward_norm", f"{last}.layer_norm", bias=False)
            yield from linear(f"{side}_norm", f"{side}.final_layer_norm", bias=False)

    def _attention(self, ours: str, theirs: str) -> Iterator[Weight]:
        cross = ours.endswith("cross")
        part = f"{theirs}.{'EncDecAttention' if cross else 'SelfAttention'}"
        for name, of in (("q", "q"), ("kv", "kv")) if cross else (("qkv", "qkv"),):
            yield from linear(f"{ours}.{name}", *(f"{part}.{letter}" for letter in of), bias=False)
        yield from linear(f"{ours}.out", f"{part}.o", bias=False)
        yield from linear(f"{ours}_norm", f"{theirs}.layer_norm", bias=False)

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"T5ForConditionalGeneration": self.written_by("translation", "summarization")}


class MT5(T5):
    """mT5 (Xue et al. 2020, arXiv:2010.11934): T5 1.1, whatever its config.json says of ties."""

    usual_feedforward = "gated-gelu"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scaled = False

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"MT5ForConditionalGeneration": self.written_by("translation", "summarization")}


def check_start(architecture: Architecture, ids: dict[str, int]) -> None:
    """Raise UserError when a tokenizer gives other ids to the roles that the decoder begins with than the model.

    Args:
        architecture: of the model.
        ids: the tokenizer's ids by role.
    """
    if isinstance(architecture, SequenceToSequence):
        for role in architecture.start:
            if ids[role] != architecture.roles[role]:
                numbers = f"{architecture.roles[role]} in its config.json, {ids[role]} in its tokenizer"
                raise UserError(f"{architecture.config.source}: the id of {role} is {numbers}")
