"""Adapters in the format of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import Problem, UserError
from llmkit.hf.architecture import Architecture
from llmkit.hf.folder import Source
from llmkit.ops.lora import LoRALinear

KEY = "model.adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
"""What stands before the names of the model's weights."""
OTHER_KINDS = (
    *("use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
)
"""Settings that make an adapter more than a product of two matrices."""


@dataclass(frozen=True)
class Adapter:
    """Adapters that were read, by the names of transformers without the prefix of models with a head."""

    source: str
    """As the user wrote it."""
    maps: Mapping[str, tuple[Tensor, Tensor, float]]
    """A (rank, in), B (out, rank), and what their product is multiplied by, of linear maps."""
    saved: Mapping[str, Tensor]
    """Weights that were trained as a whole, those of a head mostly."""
    architecture: Architecture

    def merge(self, theirs: dict[str, Tensor]) -> None:
        """Add the adapters to the matrices of the model. Raises UserError when they do not fit."""
        transposed = {name for weight in self.architecture.weights() if weight.transposed for name in weight.theirs}
        for module, (a, b, scale) in self.maps.items():
            name = f"{module}.weight"
            weight = theirs.get(name)
            shape = None if weight is None else tuple(weight.T.shape if name in transposed else weight.shape)
            if weight is None or shape != (b.shape[0], a.shape[1]):
                own = (b.shape[0], a.shape[1])
                raise self.refuse(f"adapts {module} of the shape {own}, the model has {shape or 'no such map'}")
            added = scale * (b @ a)
            theirs[name] = weight.float() + (added.T if name in transposed else added)

    @torch.no_grad()
    def begin(self, net: nn.Module) -> None:
        """Let the adapters of a network begin with these. Raises UserError when they do not fit."""
        places = {
            name.removesuffix(".weight"): (weight.ours.removesuffix(".weight"), index, len(weight.theirs))
            for weight in self.architecture.weights()
            for index, name in enumerate(weight.theirs)
        }
        for module, (a, b, scale) in self.maps.items():
            ours, index, count = places.get(module, ("", 0, 0))
            linear = net.get_submodule(ours) if ours else None
            if not isinstance(linear, LoRALinear):
                text = f"leaves out {ours or module}, which {self.source} adapts"
                raise UserError(Problem("model.lora.targets", text))
            indices = [index] if count > 1 else range(len(linear.sizes))
            sizes = [linear.sizes[i] for i in indices]
            if (b.shape[0], a.shape[1]) != (sum(sizes), linear.in_features):
                raise self.refuse(f"adapts {module} of another shape than the model's")
            for i, rows in zip(indices, b.split(sizes), strict=True):
                self._fill(linear, i, a, rows * scale / linear.scale)

    def _fill(self, linear: LoRALinear, index: int, a: Tensor, b: Tensor) -> None:
        """Copy what an adapter adds; columns of B that are zero add nothing, and may be left out."""
        own_a, own_b = linear.lora_a[index], linear.lora_b[index]
        used = b.abs().sum(0) > 0
        if used.sum() > len(own_a):
            raise UserError(Problem("model.lora.rank", f"is {len(own_a)}, but {self.source} has {int(used.sum())}"))
        kept = used.int().argsort(descending=True, stable=True)[: len(own_a)]
        own_a[: len(kept)], own_b[:, : len(kept)] = a[kept], b[:, kept]

    def refuse(self, text: str) -> UserError:
        """Return an error that says why it cannot be taken."""
        return UserError(Problem(KEY, f"{self.source} {text}"))


def read_adapter(text: str, architecture: Architecture) -> Adapter:
    """Return adapters of peft for a model of an architecture.

    Args:
        text: a folder, or a name on the hub: ``[hf:]NAME_OR_FOLDER[@REVISION]``.
        architecture: that of the model that they are for.

    Raises UserError when a file is missing or damaged, or they are of a kind that is not supported.
    """
    source = Source.of(text)
    settings = source.json(CONFIG)
    if settings is None:
        raise UserError(Problem(KEY, f"{text} has no {CONFIG}"))
    adapter = Adapter(text, {}, {}, architecture)
    if settings.get("peft_type") != "LORA":
        raise adapter.refuse(f"is of the type {str(settings.get('peft_type'))[:40]}; only LORA is supported")
    odd = [name for name in OTHER_KINDS if settings.get(name)]
    odd += ["bias"] if settings.get("bias", "none") != "none" else []
    if odd:
        raise adapter.refuse(f"has {', '.join(odd)}, which is not supported")
    weights = source.tensors(WEIGHTS)
    if weights is None:
        raise UserError(Problem(KEY, f"{text} has no {WEIGHTS}"))
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for name, value in weights.items():
        inner = name.removeprefix(ROOT).removeprefix(architecture.prefix)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", inner)
        if half:
            halves.setdefault(half[1], {})[half[2]] = value.float()
        elif "lora_" in inner:
            raise adapter.refuse(f"has {name[:100]}, which is not supported")
        else:
            saved[inner] = value.float()
    maps = {}
    for module, pair in halves.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise adapter.refuse(f"has matrices A and B of {module[:100]} that do not fit each other")
        rank = math.sqrt(len(a)) if settings.get("use_rslora") else len(a)
        maps[module] = (a, b, _alpha(settings, module, adapter) / rank)
    if not maps:
        raise adapter.refuse("has no adapters")
    return Adapter(text, maps, saved, architecture)


def _alpha(settings: Mapping[str, Any], module: str, adapter: Adapter) -> float:
    """Return the alpha of a module, whose name, or the end of it, may have one of its own."""
    own: Any = settings.get("alpha_pattern") or {}
    fitting = [alpha for key, alpha in own.items() if f".{module}".endswith(f".{key}")] if isinstance(own, dict) else []
    alpha = fitting[0] if fitting else settings.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise adapter.refuse(f"has lora_alpha {alpha!r:.40}, which should be a number above 0")
    return float(alpha)


def write_adapter(
    folder: Path, architecture: Architecture, lora: Mapping[str, Any], state: Mapping[str, Tensor], base: str | None
) -> int:
    """Write the adapters of a model, and the weights of its head, for peft; returns the number of adapted maps.

    Args:
        folder: is created; must not exist.
        architecture: what the model is for transformers.
        lora: the settings of the adapters.
        state: the weights of the model, not merged.
        base: the name or folder of the model that they are for; None: not known.

    Raises UserError when the folder exists.
    """
    from safetensors.torch import save_file

    found: dict[str, Tensor] = {}
    stacked: dict[str, int] = {}
    adapted, all_maps = [], []
    for weight in architecture.weights():
        modules = [name.removesuffix(".weight") for name in weight.theirs]
        all_maps += modules
        root = f"net.{weight.ours.removesuffix('.weight')}"
        pairs: list[tuple[Tensor, Tensor]] = []
        while (a := state.get(f"{root}.lora_a.{len(pairs)}")) is not None:
            pairs.append((a, state[f"{root}.lora_b.{len(pairs)}"]))
        if len(pairs) > len(modules):  # several maps that are one of theirs
            stacked[modules[0].rpartition(".")[2]] = len(pairs)
            pairs = [(torch.cat([a for a, _ in pairs]), torch.block_diag(*[b for _, b in pairs]))]
        for module, (a, b) in zip(modules, pairs, strict=False):
            adapted.append(module)
            found[f"{ROOT}{architecture.prefix}{module}.lora_A.weight"] = a.contiguous()
            found[f"{ROOT}{architecture.prefix}{module}.lora_B.weight"] = b.contiguous()
    task = architecture.task()
    saved = []
    for weight in task.weights if task else ():
        for name in weight.theirs if weight.ours.startswith("head.") else ():
            whole = f"{architecture.prefix if name.startswith('pooler.') else ''}{name}"
            saved.append(whole.rpartition(".")[0])
            found[f"{ROOT}{whole}"] = state[weight.ours].contiguous()
    names = [f"{architecture.prefix}{module}" for module in adapted]
    ends = {name.rpartition(".")[2] for name in names}
    alike = [module for module in all_maps if module.rpartition(".")[2] in ends]
    short = sorted(alike) == sorted(adapted) and not ends & {name.rpartition(".")[2] for name in saved}
    rank, alpha = lora["rank"], lora["alpha"]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if not saved else "SEQ_CLS" if "classifier" in saved else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora["dropout"],
        "target_modules": sorted(ends) if short else names,
        "rank_pattern": {name: count * rank for name, count in stacked.items()},
        "alpha_pattern": {name: count * alpha for name, count in stacked.items()},
        "fan_in_fan_out": any(weight.transposed for weight in architecture.weights()),
        "modules_to_save": sorted(set(saved)) or None,
        "bias": "none",
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    return len(adapted)
