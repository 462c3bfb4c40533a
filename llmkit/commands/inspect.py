"""``llmkit inspect``: what a config would train, before any training."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from llmkit.commands.fit import run
from llmkit.contracts import Batch
from llmkit.model.backbone import parameter_groups
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import CLI


class InspectCLI(CLI):
    """Builds everything that ``fit`` would and describes it instead of training."""

    as_json = False

    def _run_subcommand(self, subcommand: str) -> None:
        model, data = self.model, self.datamodule
        data.bind(model.head, model.context, model.tokenizer, model.head_ready)
        data.prepare_data()
        data.setup("fit")
        model.tokenizer = data.tokenizer
        model.configure_model()
        batch = next(iter(data.train_dataloader()))
        facts = describe(model, batch, self.trainer.accumulate_grad_batches * self.trainer.world_size)
        if self.as_json:
            print(json.dumps(facts, indent=2))
        else:
            print(_table(facts))


def inspect(command: str, argv: list[str]) -> int:
    """Describe the model of a config; ``--json`` for machines. Returns the exit code."""
    InspectCLI.as_json = "--json" in argv
    return run("fit", [word for word in argv if word != "--json"], InspectCLI, "inspect")


def describe(model: LanguageModel, batch: Batch, batches_per_step: int) -> dict[str, Any]:
    """Return the facts about a built model on one training batch.

    FLOPs count a multiply-add as two, for one position at full context; training is three times the forward pass.
    Memory is in bytes for one device in fp32: weights, gradients, optimizer state, and the activations that the
    backward pass keeps for this batch (measured by running it forward).
    """
    net = model.network
    counts = net.num_parameters()
    own = sum(p.numel() for p in model.head.parameters())
    positions = sum(batch[name].numel() for name in ("ids", "source") if name in batch)
    forward = net.flops_per_position(model.context)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "tree": tree(net) + tree(model.head),
        "parameters": {**counts, "head": own, "total": counts["total"] + own},
        "flops_per_token": {"forward": forward, "training": 3 * forward},
        "memory_bytes": {
            "weights": weights,
            "gradients": weights,
            "optimizer": optimizer_bytes(model),
            "activations": activation_bytes(model, batch),
        },
        "tokens_per_step": positions * batches_per_step,
        "vocab_size": model.tokenizer.vocab_size if model.tokenizer else 0,
    }


def tree(module: nn.Module, name: str = "", depth: int = 0) -> list[str]:
    """Return the module tree as indented lines with parameter counts; equal layers of a stack are shown once."""
    size = sum(p.numel() for p in module.parameters())
    label = f"{name}: " if name else ""
    lines = [f"{'  ' * depth}{label}{type(module).__name__}  {size:,}"]
    if isinstance(module, nn.ModuleList) and len(module):
        lines[0] = f"{'  ' * depth}{label}{len(module)} x {type(module[0]).__name__}  {size:,}"
        return lines + [line for child, part in module[0].named_children() for line in tree(part, child, depth + 1)]
    return lines + [line for child, part in module.named_children() for line in tree(part, child, depth + 1)]


def optimizer_bytes(model: LanguageModel) -> int:
    """Return the size of the optimizer's state, by letting it step once on copies of one row of each matrix."""
    total = 0.0
    for group in parameter_groups(model, model.kinds):
        matrix = group["kind"] != "vector"
        probe = nn.Parameter(torch.zeros(2, 2) if matrix else torch.zeros(2))
        probe.grad = torch.ones_like(probe)
        optimizer = model.parts.build("optimizer", [{**group, "params": [probe]}])
        optimizer.step()
        kept = [v for v in optimizer.state[probe].values() if torch.is_tensor(v) and v.shape == probe.shape]
        per_element = sum(value.element_size() for value in kept)
        total += per_element * sum(p.numel() for p in group["params"])
    return int(total)


def activation_bytes(model: LanguageModel, batch: Batch) -> int:
    """Return the bytes that autograd keeps for the backward pass of one batch, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model.head.loss(model.network, batch)
    del loss
    return sum(kept.values())


def _table(facts: dict[str, Any]) -> str:
    rows = ["\n".join(facts["tree"]), ""]
    for group, unit in {"parameters": "", "flops_per_token": "", "memory_bytes": " MiB"}.items():
        rows.append(f"{group.replace('_bytes', '').replace('_', ' ')}:")
        for name, value in facts[group].items():
            shown = f"{value / 2**20:,.1f}" if unit else f"{value:,.0f}"
            rows.append(f"  {name:<14}{shown:>16}{unit}")
    rows.append(f"tokens per step: {facts['tokens_per_step']:,}   vocabulary: {facts['vocab_size']:,}")
    return "\n".join(rows)
