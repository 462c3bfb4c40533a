"""The coordinate check of muP: whether what a network computes changes as much at every width (arXiv:2203.03466, D.1).

The same model is built at several widths and trained for a few steps on the same batches, with the optimizer's full
learning rate from the first step. For each part of the network the check measures how far its outputs on the first
batch have moved after each step: the mean absolute difference of a coordinate, averaged in logarithms over steps and
initial weights. In a model of muP that does not depend on the width, and the slope of its logarithm against that of the
width is about 0; with the standard parametrization outputs move the further the wider the network is, so that the best
learning rate falls with the width. A slope may be negative: what the attention averages over many positions of random
values comes to less in a wider network.

Why few steps: at a full rate without warmup the outputs soon are a hundred times the embeddings, and how far a part has
moved then depends on the initial weights by a factor of several. After 10 steps of AdamW at 0.01 the slope of a single
seed has a standard deviation up to 1, over the first 4 steps one below 0.2.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Batch
from llmkit.data import DataModule
from llmkit.errors import Problem, UserError
from llmkit.model.backbone import Layer
from llmkit.model.initial import seed_device
from llmkit.model.language_model import LanguageModel
from llmkit.sequence import on_device

SLOPE = 0.1
"""The least slope of a part that does not keep its scale."""


@dataclass(frozen=True)
class Part:
    """How far one part's outputs have moved.

    Attributes:
        name: the part.
        moved: mean absolute change of a coordinate, at each width; the geometric mean over steps and seeds.
        slope: of its logarithm against that of the width, by least squares.
        error: the slope's standard error, from how seeds differ; NaN with one seed.
    """

    name: str
    moved: list[float]
    slope: float
    error: float = math.nan

    @property
    def passed(self) -> bool:
        """Whether the change does not grow. One that shrinks harms nothing; NaN is a change of zero or infinity."""
        return self.slope < SLOPE

    @property
    def doubtful(self) -> bool:
        """Whether other initial weights could give the other verdict: the limit is within two standard errors."""
        return abs(self.slope - SLOPE) < 2 * self.error


def check(
    model: LanguageModel,
    data: DataModule,
    widths: Sequence[int],
    steps: int,
    seeds: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> dict[int | None, list[Part]]:
    """Train a model at several widths, and compare how far its parts' outputs have moved.

    Returns the parts by base width: those of the model's, and of the standard parametrization (None) for contrast.

    Args:
        model: its settings count, except for ``dim``; not built.
        data: its data.
        widths: two or more.
        steps: optimizer steps.
        seeds: the changes are averaged over so many initial weights, which also give the slopes their errors.
        log: called with a line of text before each width.

    Raises UserError when a width is not possible, or the data cannot be prepared.
    """
    data.bind(model.head, model.context, model.tokenizer, model.head_ready)
    data.setup("fit")
    model.tokenizer, model.head_ready = data.tokenizer, True
    batches: list[Batch] = list(itertools.islice(data.train_dataloader(), steps))
    if not batches:
        raise UserError(Problem("data.train", "has no batch to train on"))
    found: dict[int | None, list[Part]] = {}
    for base in dict.fromkeys((model.parts.spec["mup_base_dim"], None)):
        moved: dict[str, list[list[float]]] = {}  # by part: of each seed, the change at each width
        for width in widths:
            log(f"{title(base)}, width {width}: {steps} steps" + (f" from {seeds} seeds" if seeds > 1 else ""))
            for seed in range(seeds):
                for name, change in _moved(_at_width(model, width, base, seed), batches, steps).items():
                    moved.setdefault(name, [[] for _ in range(seeds)])[seed].append(change)
        found[base] = [_part(name, widths, changes) for name, changes in moved.items()]
    return found


def title(base: int | None) -> str:
    """Return the name of a parametrization."""
    return "standard parametrization" if base is None else f"muP of base width {base}"


def _part(name: str, widths: Sequence[int], changes: Sequence[Sequence[float]]) -> Part:
    """Return the result of a part from the changes of each seed at each width."""
    slopes = [slope(widths, values) for values in changes]
    known = len(slopes) > 1 and all(map(math.isfinite, slopes))
    error = statistics.stdev(slopes) / math.sqrt(len(slopes)) if known else math.nan
    return Part(name, [_mean(values) for values in zip(*changes, strict=True)], statistics.fmean(slopes), error)


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN unless all are positive and finite."""
    usable = all(0 < value < math.inf for value in values)
    return math.exp(statistics.fmean(map(math.log, values))) if usable else math.nan


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log values against log widths, by least squares; NaN unless all are positive and finite."""
    if not all(0 < value < math.inf for value in values):
        return math.nan
    xs, ys = ([math.log(value) for value in side] for side in (widths, values))
    x, y = (sum(side) / len(side) for side in (xs, ys))
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _at_width(model: LanguageModel, width: int, base: int | None, seed: int) -> LanguageModel:
    spec = {**copy.deepcopy(model.parts.spec), "dim": width, "mup_base_dim": base, "compile": False}
    try:
        other = LanguageModel(**spec)
        other.tokenizer, other.head_ready = model.tokenizer, True
        other.head.set_info(model.head.info())
        torch.default_generator.manual_seed(seed)
        other.configure_model()
    except UserError as error:
        raise UserError(*(Problem("", f"width {width}: {problem}") for problem in error.problems)) from error
    return other.to(model.device)


def _moved(model: LanguageModel, batches: Sequence[Batch], steps: int) -> Mapping[str, float]:
    """Return by how much the outputs of each part on the first batch have changed, a mean over the steps."""
    batches = [on_device(batch, model.device) for batch in batches]
    before = _outputs(model, batches[0])
    optimizer = model.parts.optimizer(model.groups())
    changes: dict[str, list[float]] = {name: [] for name in before}
    for step in range(steps):
        model.train()
        loss = model.head.loss(model.network, batches[step % len(batches)])
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        for name, value in _outputs(model, batches[0]).items():
            changes[name].append((value - before[name]).abs().mean().item())
    return {name: _mean(values) for name, values in changes.items()}


@torch.no_grad()
def _outputs(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Return the outputs of each part on a batch, in eval mode."""
    model.eval()
    devices = [] if model.device.type == "cpu" else [torch.accelerator.current_device_index()]
    fork = torch.random.fork_rng(devices, device_type="cuda" if not devices else model.device.type)
    with fork, _recorded(model) as found:
        seed_device(0, model.device)  # a head may mask at random
        model.head.loss(model.network, batch)
    return {name: torch.cat([value.flatten() for value in values]) for name, values in found.items()}


@contextmanager
def _recorded(model: LanguageModel) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of embeddings, layers, their parts, a head's linear maps, and the scores of tokens."""
    net, found = model.network, dict[str, list[Tensor]]()

    def record(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            found.setdefault(name, []).append(value.detach().clone())

    last = "encoder_norm" if net.topology == "encoder" else "decoder_norm"
    watched: dict[str, nn.Module] = {"embedding": net.embedding}
    for name, module in net.named_modules():
        if isinstance(module, Layer):
            inner = {"attention": module.attention, "cross": module.cross, "feedforward": module.feedforward}
            watched |= {f"{name}.{part}": branch for part, branch in inner.items() if branch is not None}
            watched[name] = module
    watched |= {f"head.{name}": module for name, module in model.head.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: record(name, output))
        for name, module in watched.items()
    ]
    if net.scored(model.head.scored_share):

        def scores(_: nn.Module, inputs: object, hidden_BTD: Tensor) -> None:
            record("scores", F.linear(hidden_BTD * net.output_scale, net.output_weight_VD))

        handles.append(getattr(net, last).register_forward_hook(scores))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
