"""``llmkit inspect``: the model that a config would train: its modules, parameters, FLOPs and memory."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from llmkit.commands import Parser
from llmkit.commands.fit import run_instead
from llmkit.contracts import Batch
from llmkit.model.backbone import parameter_groups
from llmkit.model.language_model import LanguageModel
from llmkit.run.cli import CLI
from llmkit.testing.invariance import build

DESCRIPTION = (
    "Build the model of a config, read one training batch, and print the modules, parameters, FLOPs per token, and the "
    "memory that training needs. Nothing is trained."
)


def run(command: str, argv: list[str]) -> int:
    """Describe the model of a config; returns the exit code."""
    parser = Parser(command, DESCRIPTION, of_fit=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options, argv = parser.parse_known_args(argv)

    def show(cli: CLI) -> int:
        build(cli.model, cli.datamodule)
        batch = next(iter(cli.datamodule.train_dataloader()))
        facts = describe(cli.model, batch, cli.trainer.accumulate_grad_batches * cli.trainer.world_size)
        print(json.dumps(facts, indent=2) if options.json else _table(facts))
        return 0

    return run_instead(show, argv, command)


def describe(model: LanguageModel, batch: Batch, batches_per_step: int) -> dict[str, Any]:
    """Return the facts about a built model as JSON-able data.

    FLOPs are per position at full context, a multiply-add counting as two; training costs three forward passes.
    Memory is in bytes, on one device in fp32: weights, gradients, optimizer state, and the activations that autograd
    keeps for the backward pass of ``batch``, measured by a forward pass.
    """
    net = model.network
    counts = net.num_parameters()
    own = sum(p.numel() for p in model.head.parameters())
    positions = sum(batch[name].numel() for name in ("ids", "source") if name in batch)
    forward = net.flops_per_position(model.context, model.head.scored_share)
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
    """Return the module tree as indented lines with parameter counts; a stack shows its first layer only."""
    kind, part = type(module).__name__, module
    if isinstance(module, nn.ModuleList) and len(module):
        kind, part = f"{len(module)} x {type(module[0]).__name__}", module[0]
    size = sum(p.numel() for p in module.parameters())
    lines = [f"{'  ' * depth}{f'{name}: ' if name else ''}{kind}  {size:,}"]
    return lines + [line for child, inner in part.named_children() for line in tree(inner, child, depth + 1)]


def optimizer_bytes(model: LanguageModel) -> int:
    """Return the bytes of the optimizer's state, measured by one step on a tiny tensor of each parameter group."""
    total = 0
    for group in parameter_groups(model, model.kinds):
        matrix = group["kind"] != "vector"
        probe = nn.Parameter(torch.zeros(2, 2) if matrix else torch.zeros(2))
        probe.grad = torch.ones_like(probe)
        optimizer = model.parts.build("optimizer", [{**group, "params": [probe]}])
        optimizer.step()
        kept = [v for v in optimizer.state[probe].values() if torch.is_tensor(v) and v.shape == probe.shape]
        per_element = sum(value.element_size() for value in kept)
        total += per_element * sum(p.numel() for p in group["params"])
    return total


def activation_bytes(model: LanguageModel, batch: Batch) -> int:
    """Return the bytes that autograd keeps for the backward pass of one batch, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model.head.loss(model.network, batch)
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
