"""What a model of ours is, in the terms of Hugging Face: the same for all the ways in which a config can say it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkit import registry
from llmkit.errors import UserError

SIZES = (
    *("dim", "num_layers", "context", "norm_first", "tie_embeddings", "embedding_norm", "token_types", "output_bias"),
    *("separate_positions", "embedding_scale", "output_scale"),
)


class NoCounterpartError(UserError):
    """A part that no architecture of Hugging Face has."""


@dataclass(frozen=True)
class Attends:
    """The softmax attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    bias: bool | str
    window: int | None
    scale: float | None
    """Of the scores; None: the usual one."""


@dataclass(frozen=True)
class Facts:
    """A network."""

    layers: list[Attends]
    cross: Attends | None
    activation: str
    gated: bool
    hidden: int
    feedforward_bias: bool
    position: str
    arguments: Mapping[str, Any]
    """Of the position plugin."""
    norm: str
    eps: float
    norm_bias: bool
    sizes: Mapping[str, Any]
    vocab_size: int

    @property
    def alike(self) -> Attends | None:
        """The attention that all layers have; None: they differ."""
        return self.layers[0] if all(layer == self.layers[0] for layer in self.layers) else None


def facts_of(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Facts:
    """Return what a model is.

    Args:
        spec: its description, as a checkpoint has it.
        state: its weights.

    Raises NoCounterpartError for parts that are nothing of Hugging Face's.
    """
    dim = int(spec["dim"])
    name, given = part("attention", spec["attention"])
    variants = [part("attention", item) for item in given["variants"]] if name == "pattern" else [(name, given)]
    depth = max(int(spec["num_layers"]), int(spec["decoder_layers"] or 0))
    layers = [_attends(*variants[i % len(variants)], dim) for i in range(depth)]
    two_sided = any(key.startswith("net.decoder.0.cross.") for key in state)
    cross = _attends(*part("attention", spec["cross_attention"]), dim) if two_sided else None
    name, given = part("feedforward", spec["feedforward"])
    activations = {"relu": "relu", "silu": "silu", "swiglu": "silu", "squared_relu": "relu2"}
    activations["gelu"] = "gelu_new" if given.get("approximate") == "tanh" else "gelu"
    if name not in activations:
        raise NoCounterpartError(f"the feedforward {name}")
    outs = [weight for key, weight in state.items() if key.endswith(".feedforward.out.weight")]
    position, placed = part("position", spec["position"])
    norm, normed = part("norm", spec["norm"])
    known = ("sinusoidal", "learned", "relative") if two_sided else ("rotary", "learned")
    if position not in known or norm not in ("rms", "layer"):
        raise NoCounterpartError(f"the position {position} with the norm {norm}")
    return Facts(
        layers=layers,
        cross=cross,
        activation=activations[name],
        gated=name == "swiglu" or bool(given.get("gated")),
        hidden=outs[0].shape[1],
        feedforward_bias=bool(given["bias"]),
        position=position,
        arguments={key: value for key, value in placed.items() if key not in registry.PASSED},
        norm=norm,
        eps=float(normed["eps"]),
        norm_bias=bool(normed.get("bias")),
        sizes={**{key: spec[key] for key in SIZES}, "decoder_layers": spec["decoder_layers"] or spec["num_layers"]},
        vocab_size=len(state["net.embedding.weight"]),
    )


def part(family: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Return the short name of a plugin and its arguments, defaults included."""
    full = registry.expand(family, spec)
    cls = registry.class_of(full["class_path"], family)
    names = {entry.class_path: name for name, entry in registry.entries(family).items()}
    defaults = {name: item.default for name, item in inspect.signature(cls).parameters.items()}
    return names.get(full["class_path"], cls.__name__), {**defaults, **(full.get("init_args") or {})}


def _attends(name: str, given: Mapping[str, Any], dim: int) -> Attends:
    if name not in ("multi_head", "grouped_query", "sliding_window", "standard"):
        raise NoCounterpartError(f"the attention {name}")
    heads = int(given.get("num_heads", 1))
    width, scale = int(given.get("head_dim") or dim // heads), given.get("scale")
    return Attends(
        num_heads=heads,
        num_kv_heads=int(given.get("num_kv_heads") or heads),
        head_dim=width,
        qk_norm=bool(given["qk_norm"]),  # one scale for queries and keys is two equal ones
        bias=given["bias"],
        window=given.get("window"),
        scale=None if scale is None or scale == width**-0.5 else float(scale),
    )
