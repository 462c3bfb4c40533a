"""The coordinate check of muP: whether what a network computes changes as much at every width (arXiv:2203.03466, D.1).

The same model is built at several widths and trained for a few steps on the same batches, with the optimizer's full
learning rate from the first step. For each part of the network the check measures how far its outputs on the first
batch have moved: the mean absolute difference of a coordinate. In a model of muP that does not depend on the width, and
the slope of its logarithm against that of the width is about 0; with the standard parametrization outputs move the
further the wider the network is, so that the best learning rate falls with the width. A slope may be negative: what the
attention averages over many positions of random values comes to less in a wider network.
"""

from __future__ import annotations

import copy
import itertools
import math
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
from llmkit.model.language_model import LanguageModel
from llmkit.sequence import on_device

SLOPE = 0.1
"""The least slope of a part that does not keep its scale."""


@dataclass(frozen=True)
class Part:
    """How far one part's outputs have moved.

    Attributes:
        name: the part.
        moved: mean absolute change of a coordinate, at each width.
        slope: of its logarithm against that of the width, by least squares.
    """

    name: str
    moved: list[float]
    slope: float

    @property
    def passed(self) -> bool:
        """Whether the change does not grow. One that shrinks harms nothing; NaN is a change of zero or infinity."""
        return self.slope < SLOPE


def check(
    model: LanguageModel,
    data: DataModule,
    widths: Sequence[int],
    steps: int,
    seeds: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> list[Part]:
    """Train a model at several widths, and compare how far its parts' outputs have moved.

    Args:
        model: its settings count, except for ``dim``; not built.
        data: its data.
        widths: two or more.
        steps: optimizer steps.
        seeds: the changes are averaged over so many initial weights.
        log: called with a line of text before each width.

    Raises UserError when a width is not possible, or the data cannot be prepared.
    """
    data.bind(model.head, model.context, model.tokenizer, model.head_ready)
    data.setup("fit")
    model.tokenizer, model.head_ready = data.tokenizer, True
    batches: list[Batch] = list(itertools.islice(data.train_dataloader(), steps))
    if not batches:
        raise UserError(Problem("data.train", "has no batch to train on"))
    moved: dict[str, list[float]] = {}
    for width in widths:
        log(f"width {width}: {steps} steps" + (f" from {seeds} seeds" if seeds > 1 else ""))
        totals: dict[str, float] = {}
        for seed in range(seeds):
            for name, change in _moved(_at_width(model, width, seed), batches, steps).items():
                totals[name] = totals.get(name, 0.0) + change / seeds
        for name, total in totals.items():
            moved.setdefault(name, []).append(total)
    return [Part(name, values, slope(widths, values)) for name, values in moved.items()]


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log values against log widths, by least squares; NaN unless all are positive and finite."""
    if not all(0 < value < math.inf for value in values):
        return math.nan
    xs, ys = ([math.log(value) for value in side] for side in (widths, values))
    x, y = (sum(side) / len(side) for side in (xs, ys))
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _at_width(model: LanguageModel, width: int, seed: int) -> LanguageModel:
    spec = {**copy.deepcopy(model.parts.spec), "dim": width, "compile": False}
    try:
        other = LanguageModel(**spec)
        other.tokenizer, other.head_ready = model.tokenizer, True
        other.head.set_info(model.head.info())
        torch.manual_seed(seed)
        other.configure_model()
    except UserError as error:
        raise UserError(*(Problem("", f"width {width}: {problem}") for problem in error.problems)) from error
    return other.to(model.device)


def _moved(model: LanguageModel, batches: Sequence[Batch], steps: int) -> Mapping[str, float]:
    """Return by how much the outputs of each part on the first batch change in training."""
    batches = [on_device(batch, model.device) for batch in batches]
    before = _outputs(model, batches[0])
    optimizer = model.parts.optimizer(model.groups())
    model.train()
    for step in range(steps):
        loss = model.head.loss(model.network, batches[step % len(batches)])
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    after = _outputs(model, batches[0])
    return {name: (after[name] - value).abs().mean().item() for name, value in before.items()}


@torch.no_grad()
def _outputs(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Return the outputs of each part on a batch, in eval mode."""
    model.eval()
    with _recorded(model) as found:
        torch.manual_seed(0)  # a head may mask at random
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
