"""``llmkit inspect``: the model that a config would train: its modules, parameters, FLOPs and memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        cli.model.spec["compile"] = False  # compiled code is not measured
        build(cli.model, cli.datamodule)
        batch = next(iter(cli.datamodule.train_dataloader()))
        facts = describe(cli.model, batch, cli.trainer.accumulate_grad_batches * cli.trainer.world_size)
        print(json.dumps(facts, indent=2) if options.json else _table(facts))
        return 0

    return run_instead(show, argv, command)


def describe(model: LanguageModel, batch: Batch, batches_per_step: int) -> dict[str, Any]:
    """Return the facts about a built model as JSON-able data.

    FLOPs are per position at full context, a multiply-add counting as two; training costs three forward passes.
    Memory is in bytes, on one device in fp32, not compiled: weights, gradients, optimizer state, the activations (all
    other tensors at the moment of the most memory) and ``peak``, the most that is held at once, measured by a forward
    and a backward pass of ``batch``. The peak may be less than the sum, because gradients are created while activations
    are freed. What kernels and the optimizer's step hold only while they run is not counted. Measuring makes autograd
    add the two gradients of a tied embedding in a third tensor: up to 5 % too much where weights dominate.
    """
    net = model.network
    counts = net.num_parameters()
    own = sum(p.numel() for p in model.head.parameters())
    positions = sum(batch[name].numel() for name in ("ids", "source") if name in batch)
    forward = net.flops_per_position(model.context, model.head.scored_share)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = optimizer_bytes(model)
    held, activations = step_bytes(model, batch, accumulated=batches_per_step > 1)
    return {
        "tree": tree(net) + tree(model.head),
        "parameters": {**counts, "head": own, "total": counts["total"] + own},
        "flops_per_token": {"forward": forward, "training": 3 * forward},
        "memory_bytes": {
            "weights": weights,
            "gradients": weights,
            "optimizer": state,
            "activations": activations,
            "peak": weights + state + held,
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


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, while they are alive.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.last = 0  # the newest storage at the peak
        self._count = 0
        self._number = {tensor.untyped_storage()._cdata: 0 for tensor in known}  # of the living storages, by age

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that are new."""
        returned = func(*args, **(kwargs or {}))
        for value in tree_leaves(returned):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if self.now > self.peak:
            self.peak, self.last = self.now, self._count
        return returned

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._number:
            self._count += 1
            self._number[storage._cdata] = self._count
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, number: int, size: int) -> None:
        del self._number[number]
        self.now -= size

    def at_peak(self, tensor: Tensor) -> bool:
        """Return whether a tensor that is alive was alive at the peak."""
        return 0 < self._number.get(tensor.untyped_storage()._cdata, 0) <= self.last


def step_bytes(model: LanguageModel, batch: Batch, accumulated: bool) -> tuple[int, int]:
    """Return the most bytes alive in the forward and backward pass of a batch, without the weights.

    Also returns how many of them were not gradients of the weights. ``accumulated``: the gradients of an earlier batch
    are there already.
    """
    parameters = list(model.parameters())
    model.train()
    with _Live([*parameters, *model.buffers()]) as live:
        for _ in range(1 + accumulated):
            found = model.head.loss(model.network, batch)
            (found.total / found.count).backward()
            del found
    gradients = [p.grad for p in parameters if p.grad is not None]
    alive = sum(grad.untyped_storage().nbytes() for grad in gradients if live.at_peak(grad))
    model.zero_grad()
    return live.peak, live.peak - alive


def _table(facts: dict[str, Any]) -> str:
    rows = ["\n".join(facts["tree"]), ""]
    for group, unit in {"parameters": "", "flops_per_token": "", "memory_bytes": " MiB"}.items():
        rows.append(f"{group.replace('_bytes', '').replace('_', ' ')}:")
        for name, value in facts[group].items():
            shown = f"{value / 2**20:,.1f}" if unit else f"{value:,.0f}"
            rows.append(f"  {name:<14}{shown:>16}{unit}")
    rows.append(f"tokens per step: {facts['tokens_per_step']:,}   vocabulary: {facts['vocab_size']:,}")
    return "\n".join(rows)
