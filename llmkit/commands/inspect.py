"""``llmkit inspect``: the model that a config would train: its modules, parameters, FLOPs and memory."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.commands import Parser
from llmkit.commands.fit import run_instead
from llmkit.contracts import Batch
from llmkit.errors import note
from llmkit.model.groups import parameter_groups
from llmkit.model.language_model import LanguageModel
from llmkit.ops.losses import shapes_only
from llmkit.run.cli import CLI
from llmkit.testing.invariance import build

SELECTIONS = {
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
}
"""What takes masks, or the numbers of elements."""
FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default, torch.ops.aten.ones.default}
"""What parameters are made by, before they get their values."""

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
        cli.model.word_vectors = None  # values: there may be none
        with Virtual():
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
    other tensors at the moment of the most memory) and ``peak``, the most that is held at once in a forward and a
    backward pass of ``batch``, of which shapes alone are computed; both are None, with a note, where a plugin asks for
    values. The peak may be less than the sum, because gradients are created while activations
    are freed. What kernels and the optimizer's step hold only while they run is not counted. Measuring makes autograd
    add the two gradients of a tied embedding in a third tensor: up to 5 % too much where weights dominate.
    """
    net = model.network
    counts = net.num_parameters()
    own = sum(p.numel() for p in model.head.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    positions = sum(batch[name].numel() for name in ("ids", "source") if name in batch)
    forward = net.flops_per_position(model.context, model.head.scored_share)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = optimizer_bytes(model)
    held = activations = None
    try:
        held, activations = step_bytes(model, batch, accumulated=batches_per_step > 1)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        note(f"activations and peak are unknown: {error.func} of a plugin depends on values, and only shapes are known")
    return {
        "tree": tree(net) + tree(model.head),
        "parameters": {**counts, "head": own, "total": counts["total"] + own, "trained": trained},
        "flops_per_token": {"forward": forward, "training": 3 * model.head.passes * forward},
        "memory_bytes": {
            "weights": weights,
            "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
            "optimizer": state,
            "activations": activations,
            "peak": None if held is None else weights + state + held,
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


class Virtual(TorchDispatchMode):
    """Computes shapes instead of values, without memory, wherever a virtual tensor takes part; counts the bytes.

    Virtual are the tensors that ``virtual`` returns, new ones of more than ``LARGE`` elements, and what comes of them.
    All else is computed: a batch is real, so that what depends on its values (how much of it is padding) is right.

    Attributes:
        now: bytes of the tensors, virtual or not, that operations have made and that are alive.
        peak: the most at any time.
    """

    LARGE = 2**16

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._last = 0  # the newest storage at the peak
        self._count = 0
        self._number: dict[int, int] = {}  # of the living storages, by age
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def virtual(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape, dtype and device without memory, which is not counted."""
        with torch.no_grad():
            made = self._fake.from_tensor(tensor) if not isinstance(tensor, FakeTensor) else tensor
        self._number[made.untyped_storage()._cdata] = 0
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that are new."""
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        if any(isinstance(value, FakeTensor) for value in inputs):
            args = _selected(func, args)
            with self._fake:
                returned = func(*args, **kwargs)
                if func is torch.ops.aten.mkldnn_rnn_layer.default:  # whose shape function has no workspace
                    returned = *returned[:3], torch.empty(_workspace(args), dtype=torch.uint8)
        elif func in FACTORIES and math.prod(args[0]) > self.LARGE:
            with self._fake:
                returned = func(*args, **kwargs)
        else:
            returned = func(*args, **kwargs)
        for value in tree_leaves(returned):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if self.now > self.peak:
            self.peak, self._last = self.now, self._count
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
        return 0 < self._number.get(tensor.untyped_storage()._cdata, 0) <= self._last


def _workspace(args: tuple[Any, ...]) -> int:
    """Return the bytes in which oneDNN keeps what the gradient of an LSTM needs: as many more for each position."""

    def measured(length: int) -> int:
        with unset_fake_temporarily():
            given = [torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in args[1:]]
            first = torch.zeros((length, *args[0].shape[1:]), dtype=args[0].dtype)
            workspace: Tensor = torch.ops.aten.mkldnn_rnn_layer(first, *given)[3]
            return workspace.nbytes

    length, most = len(args[0]), 32
    if length <= most:
        return measured(length)
    return measured(most) + (length - most) * (measured(most) - measured(most // 2)) // (most // 2)


def _selected(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with real masks replaced by the places that they select: their number gives the shape."""
    if func.overloadpacket not in SELECTIONS:
        return args
    places: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero().unbind(1) if is_mask else [index]
    return args[0], places, *args[2:]


class _Step(nn.Module):
    """The forward and backward pass of a batch, as a module so that its parameters can be replaced."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.net, self.head = model.network, model.head

    def forward(self, batch: Batch) -> None:
        """Add up the gradient of the mean loss."""
        loss = self.head.loss(self.net, batch)
        (loss.total / loss.count).backward()


def step_bytes(model: LanguageModel, batch: Batch, accumulated: bool) -> tuple[int, int]:
    """Return the most bytes alive in the forward and backward pass of a batch, without the weights.

    Also returns how many of them were not gradients of the weights. ``accumulated``: the gradients of an earlier batch
    are there already. Nothing of the size of the model is allocated.
    """
    step = _Step(model).train()
    with Virtual() as counter, shapes_only():
        parameters = {name: counter.virtual(parameter) for name, parameter in step.named_parameters()}
        for _ in range(1 + accumulated):
            functional_call(step, parameters, (batch,))
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    alive = sum(grad.untyped_storage().nbytes() for grad in gradients if counter.at_peak(grad))
    return counter.peak, counter.peak - alive


def _table(facts: dict[str, Any]) -> str:
    rows = ["\n".join(facts["tree"]), ""]
    for group, unit in {"parameters": "", "flops_per_token": "", "memory_bytes": " MiB"}.items():
        rows.append(f"{group.replace('_bytes', '').replace('_', ' ')}:")
        for name, value in facts[group].items():
            shown = "unknown" if value is None else f"{value / 2**20:,.1f}{unit}" if unit else f"{value:,.0f}"
            rows.append(f"  {name:<14}{shown:>{16 + len(unit)}}")
    rows.append(f"tokens per step: {facts['tokens_per_step']:,}   vocabulary: {facts['vocab_size']:,}")
    return "\n".join(rows)
