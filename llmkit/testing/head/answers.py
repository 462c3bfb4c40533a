"""Properties of heads after the loss: metrics, and answers that do not depend on the batch."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit.testing.head.subject import CONTEXT, TOKENIZER, Subject, close_to, items_of, sums
from llmkit.testing.numerics import alike, gap
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "metrics are torchmetrics, new ones each time; the monitored one is a single number, better at the declared side",
    "No best checkpoint is kept or, with the wrong side, the worst one is.",
)
def metrics(subject: Subject) -> str:
    everything = list(range(len(subject.items)))
    name, side = subject.ready.monitor
    for stage in subject.stages:
        found = subject.evaluated(stage, [everything])
        nn.ModuleDict(found)  # refuses names that a module cannot have
        again = subject.ready.metrics(stage)
        for key, metric in found.items():
            if not isinstance(metric, Metric):
                raise Violation(f"{stage}: '{key}' is a {type(metric).__name__}, expected a torchmetrics.Metric")
            if metric is again.get(key):
                raise Violation(f"{stage}: metrics returns the same '{key}' each time, expected a new one")
            if not isinstance(metric.compute(), Tensor):
                raise Violation(f"{stage}: '{key}' computes a {type(metric.compute()).__name__}, expected a tensor")
        if stage == "validation":
            if name not in found:
                raise Violation(f"monitor is '{name}', but the validation metrics are {', '.join(found)}")
            if found[name].compute().numel() != 1:
                raise Violation(f"monitor is '{name}', which has the shape {tuple(found[name].compute().shape)}")
            better = {True: "max", False: "min"}.get(found[name].higher_is_better)
            if better not in (None, side):
                raise Violation(
                    f"monitor is ('{name}', '{side}'), but {type(found[name]).__name__} is better at the {better}"
                )
    return ", ".join(found)


@PROPERTIES(
    "metrics do not depend on how rows are batched, and restart after reset",
    "The same model gets different results with another batch size: those of a mean over batches.",
)
def metrics_in_any_batch(subject: Subject) -> None:
    everything = list(range(len(subject.items)))
    for stage in subject.stages:
        whole = subject.evaluated(stage, [everything])
        for parts in (
            [everything[:1], everything[1:]],
            [[index] for index in everything],
            [everything[2:][::-1], everything[:2]],
        ):
            _same_metrics(
                subject.evaluated(stage, parts), whole, f"{stage}, rows in batches {parts} against all at once"
            )
        for rows in (everything[:1], everything[1:]):
            again = subject.evaluated(stage, [everything])
            for metric in again.values():
                metric.reset()
            subject.evaluate(again, rows)
            _same_metrics(again, subject.evaluated(stage, [rows]), f"{stage}, after reset, rows {rows}")


@PROPERTIES(
    "metrics of several processes combine to those of one",
    "The same model gets different results on two GPUs.",
)
def metrics_of_processes(subject: Subject) -> None:
    everything = list(range(len(subject.items)))
    halves = everything[:2], everything[2:]
    for stage in subject.stages:
        whole = subject.evaluated(stage, [everything])
        here, there = (subject.evaluated(stage, [half]) for half in halves)
        for name, metric in here.items():
            sent: list[Tensor] = []
            _connect(there[name], functools.partial(_send, sent))
            there[name].compute()
            _connect(metric, functools.partial(_receive, iter(sent)))
        _same_metrics(
            here, whole, f"{stage}, rows {halves[0]} in one process, {halves[1]} in another, against all in one"
        )


def _connect(metric: Metric, gather: Callable[..., list[Tensor]]) -> None:
    """Make a metric exchange its states by ``gather``, as if there were several processes."""
    for part in metric.modules():
        if isinstance(part, Metric):
            part.dist_sync_fn = gather
            part.distributed_available_fn = lambda: True


def _send(sent: list[Tensor], own: Tensor, group: Any = None) -> list[Tensor]:
    sent.append(own)
    return [own]


def _receive(others: Iterator[Tensor], own: Tensor, group: Any = None) -> list[Tensor]:
    return [own, next(others)]


def _same_metrics(found: dict[str, Any], expected: dict[str, Any], place: str) -> None:
    for name, metric in found.items():
        a, b = metric.compute().double(), expected[name].compute().double()
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()) or gap(a.nan_to_num(), b.nan_to_num()) > 1e-4:
            raise Violation(f"{place}: '{name}' is {_number(a)}; expected {_number(b)}")


def _number(value: Tensor) -> str:
    return f"{float(value):.6g}" if value.numel() == 1 else f"{value.tolist()!r:.80}"


@PROPERTIES(
    "the metric 'loss' is the mean over what the loss counts",
    "Perplexities and losses are not comparable with those of training, or of other batch sizes.",
)
def loss_metric(subject: Subject) -> str:
    everything = list(range(len(subject.items)))
    whole = subject.evaluated("validation", [everything])
    if "loss" not in whole:
        raise NotApplicable("there is no metric called 'loss'")
    total = 0.0
    for index, (_, count) in enumerate(subject.losses):
        if count:
            total += float(subject.evaluated("validation", [[index]])["loss"].compute()) * count
    counted = sum(count for _, count in subject.losses)
    found, expected = float(whole["loss"].compute()), total / counted
    if not math.isclose(found, expected, rel_tol=1e-4):
        raise Violation(f"it is {found:.6g}; the mean of the rows' own, weighted by loss.count, is {expected:.6g}")
    trained = sum(total for total, _ in subject.losses) / counted
    same = math.isclose(found, trained, rel_tol=1e-4)
    return "as in training" if same else f"{found:.4g}, in training {trained:.4g} (smoothing?)"


@PROPERTIES(
    "a row's answer is the same in any batch",
    "The answer to a text depends on the other texts in the batch.",
)
def answers_in_any_batch(subject: Subject) -> None:
    rows = subject.inputs
    count = len(next(iter(rows.values())))
    alone = [subject.predict({name: [values[index]] for name, values in rows.items()}) for index in range(count)]
    for group in ([0, 1 % count], [0, count - 1], list(range(count)), list(range(count))[::-1]):
        found = subject.predict({name: [values[index] for index in group] for name, values in rows.items()})
        if len(found) != len(group):
            raise Violation(f"{subject.shown(*group)}: {len(group)} rows got {len(found)} answers")
        for index, answer in zip(group, found, strict=True):
            if not alike([answer], alone[index]):
                others = ", ".join(str(other) for other in group if other != index)
                raise Violation(
                    f"{subject.shown(index)}: the answer together with row {others} is {answer!r:.100}, alone "
                    f"{alone[index][0]!r:.100}. Padding that is read, or rows in another order?"
                )


@PROPERTIES(
    "rows longer than the context are cut to it",
    "A long text stops training, or the network gets positions beyond its context.",
)
def long_rows(subject: Subject) -> None:
    head = subject.ready
    long = {name: [_longer(value, 40) for value in values] for name, values in subject.columns.items()}
    with torch.no_grad():
        items = items_of(head.encode(copy.deepcopy(long), TOKENIZER, CONTEXT))
        found = head.loss(subject.net, subject.batch(items[:2]))
        if not torch.isfinite(found.total):
            raise Violation(f"the loss of long rows is {float(found.total)}")
        inputs = {name: long[name][:2] for name in subject.inputs}
        if len(subject.predict(inputs)) != 2:
            raise Violation("two long rows did not get two answers")


def _longer(value: Any, times: int) -> Any:
    """Return a text or list repeated; labels and answer spans stay."""
    if isinstance(value, list):
        return value * times
    return " ".join([value] * times) if isinstance(value, str) and " " in value else value


@PROPERTIES(
    "the loss equals its reference",
    "It does not compute what it claims to: an offset of one, a wrong sign, smoothing.",
)
def reference(subject: Subject) -> None:
    if subject.reference is None:
        raise NotApplicable("no reference given")
    for index, found in enumerate(subject.losses):
        row = {name: values[index] for name, values in subject.columns.items()}
        with torch.no_grad():
            total, count = subject.reference(subject.ready, subject.net, row, TOKENIZER)
        if not close_to(found, (float(total), float(count))):
            raise Violation(f"{subject.shown(index)}: loss {sums(found)}, in the reference {sums((total, count))}")
