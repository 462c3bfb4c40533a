"""Causal architectures: GPT-2, and the family of Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from llmkit.hf.architecture import Architecture, Settings, Task
from llmkit.hf.mapping import Weight, linear


class GPT2(Architecture):
    """GPT-2 (Radford et al. 2019). Its linear maps are stored as (in, out), columns of queries, keys and values."""

    prefix = "transformer."
    unused = r"h\.\d+\.attn\.(bias|masked_bias)"
    copies: ClassVar[dict[str, str]] = {"lm_head.weight": "wte.weight"}

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        odd = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
        if not c.flag("scale_attn_weights", True) or any(c.flag(name) for name in odd):
            raise c.refuse(f"with other attention scores ({', '.join(odd)}, scale_attn_weights) is not supported")
        dim = c.size("n_embd")
        return {
            "attention": {"name": "multi_head", "num_heads": c.size("n_head"), "qk_norm": False, "bias": True},
            "position": {"name": "learned"},
            "feedforward": self.feedforward(
                str(c.get("activation_function") or "gelu_new"), c.size("n_inner", 4 * dim), bias=True
            ),
            "norm": {"name": "layer", "eps": c.number("layer_norm_epsilon", 1e-5), "bias": True},
            "norm_first": True,
            "dim": dim,
            "num_layers": c.layers("n_layer"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": c.flag("tie_word_embeddings", True),
            "context": c.size("n_positions"),
        }

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        yield Weight("embedding.weight", ("wte.weight",))
        yield Weight("position.table.weight", ("wpe.weight",))
        for i in range(self.config.layers("n_layer")):
            ours, theirs = f"decoder.{i}", f"h.{i}"
            yield from linear(f"{ours}.attention_norm", f"{theirs}.ln_1")
            yield from linear(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True)
            yield from linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True)
            yield from linear(f"{ours}.feedforward_norm", f"{theirs}.ln_2")
            yield from linear(f"{ours}.feedforward.inner", f"{theirs}.mlp.c_fc", transposed=True)
            yield from linear(f"{ours}.feedforward.out", f"{theirs}.mlp.c_proj", transposed=True)
        yield from linear("decoder_norm", "ln_f")
        if not self.config.flag("tie_word_embeddings", True):
            yield Weight("output.weight", ("lm_head.weight",))

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        return {"GPT2LMHeadModel": Task({"name": "generation"})}


class Llama(Architecture):
    """Llama (arXiv:2302.13971) and those that differ from it in little: Mistral, Qwen2, Qwen3 (not their mixtures)."""

    prefix = "model."
    unused = r".*rotary_emb\.inv_freq"
    copies: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_tokens.weight"}

    @property
    def _bias(self) -> bool | str:
        """Which projections of the attention have biases."""
        return "qkv" if self.config.model_type == "qwen2" else self.config.flag("attention_bias")

    def settings(self) -> Settings:
        """Return the settings of the network."""
        c = self.config
        dim, heads = c.size("hidden_size"), c.size("num_attention_heads")
        eps = c.number("rms_norm_eps", 1e-6)
        attention: Settings = {
            "name": "grouped_query",
            "num_heads": heads,
            "num_kv_heads": c.size("num_key_value_heads", heads),
            "qk_norm": False,
            "bias": self._bias,
            "head_dim": c.size("head_dim", dim // heads),
        }
        if c.model_type == "qwen3":
            attention["qk_norm"] = "separate"
            if eps != 1e-6:
                raise c.refuse(f"with rms_norm_eps {eps} is not supported: queries and keys have 1e-6 here")
        layers = [{**attention, **extra} for extra in self._windows()]
        alike = all(layer == layers[0] for layer in layers)
        return {
            "attention": layers[0] if alike else {"name": "pattern", "variants": layers},
            "position": self._position(),
            "feedforward": self.feedforward(
                str(c.get("hidden_act") or "silu"), c.size("intermediate_size"), bias=c.flag("mlp_bias"), gated=True
            ),
            "norm": {"name": "rms", "eps": eps},
            "norm_first": True,
            "dim": dim,
            "num_layers": c.layers("num_hidden_layers"),
            "vocab_size": c.size("vocab_size"),
            "tie_embeddings": c.flag("tie_word_embeddings"),
            "context": c.size("max_position_embeddings"),
        }

    def _windows(self) -> list[Settings]:
        """Return for each layer what a window adds to the attention's settings: nothing where it sees everything."""
        c = self.config
        number, types = c.layers("num_hidden_layers"), c.get("layer_types")
        if c.model_type == "mistral":
            windowed = [c.get("sliding_window") is not None] * number
        elif isinstance(types, list) and set(map(str, types)) <= {"sliding_attention", "full_attention"}:
            windowed = [kind == "sliding_attention" for kind in types]
        elif types is not None:
            raise c.refuse(f"with the layer_types {types!r:.100} is not supported")
        else:
            first = c.get("max_window_layers")
            first = first if c.flag("use_sliding_window") and type(first) is int else number
            windowed = [layer >= first for layer in range(number)]
        if len(windowed) != number:
            raise c.refuse(f"has {number} layers and {len(windowed)} layer_types")
        return [{"name": "sliding_window", "window": c.size("sliding_window")} if one else {} for one in windowed]

    def _position(self) -> Settings:
        c = self.config
        rope: Any = c.get("rope_parameters") or c.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise c.refuse(f"with the rope_scaling {rope!r:.60} is not supported")
        base = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        kind = rope.get("rope_type") or rope.get("type") or "default"
        scaling = {
            name: value for name, value in rope.items() if name not in ("rope_theta", "type") and value is not None
        }
        if kind != "default":
            if kind not in ("linear", "llama3", "yarn"):
                raise c.refuse(f"with rope scaling {kind!r:.60} is not supported; these are: linear, llama3, yarn")
            if kind == "linear":
                scaling = {"factor": rope.get("factor")}
            elif scaling.get("original_max_position_embeddings") is None:
                scaling["original_max_position_embeddings"] = c.size("max_position_embeddings")
            return {"name": "rotary", "base": float(base), "scaling": {**scaling, "rope_type": kind}}
        return {"name": "rotary", "base": float(base)}

    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""
        c, bias = self.config, self._bias
        windows = self._windows()
        attention = "attention" if all(window == windows[0] for window in windows) else "attention.variant"
        yield Weight("embedding.weight", ("embed_tokens.weight",))
        for i in range(c.layers("num_hidden_layers")):
            ours, theirs = f"decoder.{i}", f"layers.{i}"
            yield from linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
            projections = (f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            yield from linear(f"{ours}.{attention}.qkv", *projections, bias=bool(bias))
            if c.model_type == "qwen3":
                yield Weight(f"{ours}.{attention}.qk_scale", (f"{theirs}.self_attn.q_norm.weight",))
                yield Weight(f"{ours}.{attention}.k_scale", (f"{theirs}.self_attn.k_norm.weight",))
            yield from linear(f"{ours}.{attention}.out", f"{theirs}.self_attn.o_proj", bias=bias is True)
            yield from linear(f"{ours}.feedforward_norm", f"{theirs}.post_attention_layernorm", bias=False)
            gate_up = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
            yield from linear(f"{ours}.feedforward.inner", *gate_up, bias=c.flag("mlp_bias"))
            yield from linear(f"{ours}.feedforward.out", f"{theirs}.mlp.down_proj", bias=c.flag("mlp_bias"))
        yield from linear("decoder_norm", "norm", bias=False)
        if not c.flag("tie_word_embeddings"):
            yield Weight("output.weight", ("lm_head.weight",))

    def tasks(self) -> dict[str, Task]:
        """Return the heads of this architecture."""
        names = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
        return dict.fromkeys(names, Task({"name": "generation"}))
