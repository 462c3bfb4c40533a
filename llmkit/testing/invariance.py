"""Batch invariance: loss, metrics, answers and gradients in many kinds of batches, against one row at a time.

In a plugin's own tests::

    from llmkit.testing import invariance

    findings = invariance.check(LanguageModel(head=MyHead, context=64), DataModule(train="rows.csv"))
    assert all(finding.passed for finding in findings), findings

``llmkit verify metrics --config FILE`` prints the same findings as a table.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.contracts import Batch, Head, Stage, Tokenizer
from llmkit.data import DataModule
from llmkit.data.tokens import Blocks, Index, split_batches
from llmkit.errors import UserError
from llmkit.model.backbone import Backbone
from llmkit.model.language_model import LanguageModel
from llmkit.ops.metrics import EXACT
from llmkit.sequence import DecodingOptions, on_device
from llmkit.testing import order, precision
from llmkit.testing.arrangements import Batches, Cut, Rows, Ways, arrangements, chosen, distinct, one_by_one
from llmkit.testing.head.subject import items_of
from llmkit.testing.numerics import alike

ACCUMULATIONS = (1, 2, 4, 8)
TOLERANCE = 1e-6
SAMPLED_SIZES = (4, 16)
NEW_TOKENS = 8
"""Most tokens of a generated text: enough for a difference to show."""


@dataclass(frozen=True)
class Finding:
    """The result of the comparison of one number.

    Attributes:
        what: which number.
        reference: its value, computed one row at a time.
        difference: the largest difference of any way of batching: relative, for values below 1 absolute.
        first: the first way of batching with a difference above what is allowed, and its rows; empty: none.
        exact: the difference in double precision, if single precision alone would not have passed.
    """

    what: str
    reference: str
    difference: float
    first: str = ""
    exact: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the number does not depend on the batching."""
        return not self.first


def check(model: LanguageModel, data: DataModule, rows: int = 64) -> list[Finding]:
    """Compare loss, metrics, answers and gradients of a model over many ways of batching the same rows.

    The rows come from the validation data if there is any; those for the gradients from the training data. They are
    read in batches of 1 to 64, in several orders, by ``batch_tokens``, and paired with the longest row; blocks of a
    joined text are also cut to different lengths and padded. Metrics are also computed as under each precision plugin
    of Lightning, which must not round what they add up. Texts are also sampled, where the head's options do not.
    Everything is computed in eval mode, on the model's device and in the precision of its weights. Numbers that differ
    in single precision are computed again in double precision, which distinguishes rounding from a bug.

    Further, the first half of the validation batches must represent all of them: the mean length of their rows (or
    their mean place in a text that is cut into blocks) is compared, see ``llmkit.testing.order``.

    Args:
        model: built or not; without weights, it gets new ones.
        data: its data.
        rows: how many rows (or blocks) are compared.

    Raises:
        UserError: the data cannot be prepared, or is streamed and has no validation part.
    """
    build(model, data)
    return compare(model, data, rows)


def compare(
    model: LanguageModel, data: DataModule, rows: int = 64, log: Callable[[str], None] = lambda line: None
) -> list[Finding]:
    """Do what ``check`` does, after ``build``; ``log`` is called with a line of text before each part of the work."""
    assert model.tokenizer is not None
    net, head, training, decoding = model.network, model.head, model.training, model.head.decoding
    limit = min(decoding.max_new_tokens or NEW_TOKENS, NEW_TOKENS)
    head.decoding = dataclasses.replace(
        decoding, max_new_tokens=limit, min_new_tokens=min(decoding.min_new_tokens, limit)
    )
    model.eval()
    try:
        found = _findings(net, head, model.tokenizer, data, rows, log)
        failed = {finding.what for finding in found if not finding.passed}
        weight = net.output_weight_VD
        if failed and weight.dtype == torch.float32 and weight.device.type != "mps":
            log(f"{len(failed)} numbers differ: everything again in double precision")
            exact = copy.deepcopy(net).double(), copy.deepcopy(head).double()
            again = {finding.what: finding for finding in _findings(*exact, model.tokenizer, data, rows, log)}
            found = [_doubted(finding, again[finding.what]) for finding in found]
        found += _first_half(data)
    finally:
        head.decoding = decoding
        model.train(training)
    return found


def _doubted(single: Finding, double: Finding) -> Finding:
    """Return the finding in single precision, cleared if double precision shows that it is rounding."""
    if single.passed or not double.passed:
        return single
    return dataclasses.replace(single, first="", exact=double.difference)


def _first_half(data: DataModule) -> list[Finding]:
    """Return whether the first validation batches represent all of them; nothing where there is but one batch."""
    compared = order.first_half(data)
    if compared is None:
        return []
    what, whole, half, batches, represents = compared
    first = "" if represents else f"the first {batches} batches, {what} {half:.6g}"
    return [Finding("first validation batches", f"{what} {whole:.6g}", abs(half / max(whole, 1e-9) - 1), first)]


def build(model: LanguageModel, data: DataModule) -> None:
    """Prepare the data and build the network, as the start of a fit does, without a trainer."""
    data.bind(model.head, model.context, model.tokenizer, model.head_ready)
    data.setup("fit")
    model.tokenizer, model.head_ready = data.tokenizer, True
    model.configure_model()


def _findings(
    net: Backbone, head: Head, tokenizer: Tokenizer, data: DataModule, count: int, log: Callable[[str], None]
) -> list[Finding]:
    stage: Stage = "validation" if data.val_dataloader() else "train"
    if stage == "train" and data.streaming:
        raise UserError("data.validation is needed to compare numbers of streamed data")
    split = data.split(stage)
    rows = chosen(split, count)
    ways = arrangements(split, rows, data.batch_tokens or 2 * net.max_length)
    examined = Examined(net, head, tokenizer, split)
    found = []
    for name, numbers in {"loss": examined.losses, "metrics": examined.metrics}.items():
        log(f"{name} of {len(rows)} {stage} rows in {len(ways)} ways of batching")
        found += numbers(ways)
    log("answers")
    found.append(examined.answers(ways))
    if isinstance(split, Blocks):
        log("loss and metrics of padded rows")
        examined = Examined(net, head, tokenizer, Cut(split), " of padded rows")
        found += [*examined.losses(ways), *examined.metrics(ways)]
    if not data.streaming:
        log(f"gradients, accumulated over {', '.join(map(str, ACCUMULATIONS))} batches")
        split = data.split("train")
        examined = Examined(net, head, tokenizer, Cut(split) if isinstance(split, Blocks) else split)
        found.append(examined.gradient(chosen(split, count)))
    return found


class Comparison:
    """The largest difference of a number over the ways of batching, and the first one that is too large."""

    def __init__(self) -> None:
        self.difference, self.first = 0.0, ""

    def add(self, difference: float, where: Callable[[], str]) -> None:
        """Record a difference; ``where`` returns its place, in case it is the first that is too large."""
        difference = math.inf if math.isnan(difference) else difference
        self.difference = max(self.difference, difference)
        if difference > TOLERANCE and not self.first:
            self.first = where()

    def finding(self, what: str, reference: str) -> Finding:
        """Return what was found."""
        return Finding(what, reference, self.difference, self.first)


class Examined:
    """A model's numbers for rows of one source.

    Args:
        net: the network, in eval mode.
        head: the head, in eval mode.
        tokenizer: the tokenizer.
        source: returns the batch of some rows.
        suffix: added to the names of the numbers.
    """

    def __init__(self, net: Backbone, head: Head, tokenizer: Tokenizer, source: Rows, suffix: str = "") -> None:
        self.net, self.head, self.tokenizer, self.source, self.suffix = net, head, tokenizer, source, suffix
        self.device = net.output_weight_VD.device

    def batch(self, rows: Index) -> Batch:
        """Return rows as one batch on the device."""
        return on_device(self.source[rows], self.device)

    def losses(self, ways: Ways) -> list[Finding]:
        """Compare the training loss, in eval mode, and what it counts, batch by batch with the sums of their rows."""
        alone = {row: self._loss(np.array([row])) for row in distinct(ways)}
        total, count = (sum(pair[i] for pair in alone.values()) for i in (0, 1))
        losses, counts = Comparison(), Comparison()
        for way, batches in ways.items():
            for batch in batches:
                found = self._loss(batch)
                expected = [sum(alone[row][i] for row in batch.tolist()) for i in (0, 1)]
                where = functools.partial("{}, {}".format, way, shown_rows(batch))
                losses.add(abs(found[0] - expected[0]) / max(abs(expected[0]), expected[1], 1e-9), where)
                counts.add(abs(found[1] - expected[1]), where)
        return [
            losses.finding(f"loss{self.suffix}", f"{total / max(count, 1):.6g}"),
            counts.finding(f"count of the loss{self.suffix}", f"{count:g}"),
        ]

    @torch.no_grad()
    def _loss(self, rows: Index) -> tuple[float, float]:
        found = self.head.loss(self.net, self.batch(rows))
        return float(found.total), float(found.count)

    def metrics(self, ways: Ways) -> list[Finding]:
        """Compare the validation metrics, and any further ones of the test data."""
        stages: dict[Stage, str] = {"validation": "val", "test": "test"}
        known: set[str] = set()
        found = []
        for stage, prefix in stages.items():
            names = [name for name in self.head.metrics(stage) if name not in known]
            known.update(names)
            if names:
                found += self._metrics(ways, stage, {name: f"{prefix}_{name}{self.suffix}" for name in names})
        return found

    def _metrics(self, ways: Ways, stage: Stage, names: dict[str, str]) -> list[Finding]:
        compared = {name: Comparison() for name in names}
        references: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for way, batches in ways.items():
            rows = tuple(sorted(np.concatenate(batches).tolist()))
            if rows not in references:
                references[rows] = self._measured(stage, one_by_one(rows))
            measured = self._measured(stage, batches)
            for name, comparison in compared.items():
                where = functools.partial(self._culprit, way, stage, name, batches)
                comparison.add(gap(measured[name], references[rows][name]), where)
        rows, reference = next(iter(references.items()))
        for plugin in precision.PLUGINS:
            under = self._measured_under(plugin, stage, one_by_one(rows))
            for name, comparison in compared.items():
                where = functools.partial("trainer.precision {}, batch size 1".format, plugin)
                comparison.add(gap(under[name], reference[name]), where)
        return [comparison.finding(names[name], shown(reference[name])) for name, comparison in compared.items()]

    @torch.inference_mode()
    def _measured(self, stage: Stage, batches: Batches) -> dict[str, Tensor]:
        metrics: dict[str, Any] = self.head.metrics(stage)
        for metric in metrics.values():
            metric.to(self.device)
        for batch in batches:
            self.head.evaluate(self.net, self.batch(batch), metrics, self.tokenizer)
        return {name: metric.compute().cpu().double() for name, metric in metrics.items()}

    @torch.inference_mode()
    def _measured_under(self, plugin: str, stage: Stage, batches: Batches) -> dict[str, Tensor]:
        def update(batch: Batch, metrics: Any) -> None:
            for metric in metrics.values():
                metric.to(self.device)
            self.head.evaluate(self.net, batch, metrics, self.tokenizer)

        return precision.measured(plugin, lambda: self.head.metrics(stage), map(self.batch, batches), update)

    def _culprit(self, way: str, stage: Stage, name: str, batches: Batches) -> str:
        """Return the way of batching, and which of its batches differs on its own."""
        for batch in batches:
            alone = self._measured(stage, one_by_one(batch.tolist()))
            if gap(self._measured(stage, [batch])[name], alone[name]) > TOLERANCE:
                return f"{way}, {shown_rows(batch)}"
        return f"{way}, no single batch but all together (a mean of batch means?)"

    def answers(self, ways: Ways) -> Finding:
        """Compare the answers; texts are generated as the head's options say, and sampled, and are short."""
        compared = Comparison()
        self._compare_answers(compared, ways, "", self.head.decoding)
        options = self.head.decoding
        if options.temperature == 0 or options.num_beams > 1:
            sampled = dataclasses.replace(options, temperature=1.0, num_beams=1, num_return_sequences=1)
            rows = np.concatenate(next(iter(ways.values())))
            sizes = {f"batch size {size}": split_batches(rows, size) for size in SAMPLED_SIZES}
            self._compare_answers(compared, sizes, ", sampled", sampled)
        return compared.finding("answers", f"to {len(distinct(ways))} rows")

    def _compare_answers(self, compared: Comparison, ways: Ways, suffix: str, options: DecodingOptions) -> None:
        alone = {row: self._answers(np.array([row]), options)[0] for row in distinct(ways)}
        for way, batches in ways.items():
            for batch in batches:
                pairs = zip(batch.tolist(), self._answers(batch, options), strict=True)
                off = [row for row, answer in pairs if not alike(answer, alone[row])]
                name = "{}{}, {}: another answer to row {}"
                where = functools.partial(name.format, way, suffix, shown_rows(batch), *off[:1])
                compared.add(len(off) / len(batch), where)

    @torch.inference_mode()
    def _answers(self, rows: Index, options: DecodingOptions) -> list[dict[str, Any]]:
        batch = self.source[rows]
        if self.head.layout == "blocks":  # prompts: short texts that end in a mask, for heads that fill masks
            features = self.head.encode({name: [""] * len(rows) for name in self.head.inputs}, self.tokenizer, 1)
            pad, mask = self.tokenizer.pad_id, self.tokenizer.mask_id
            texts = [ids[: 1 + row % 13] for row, ids in zip(rows.tolist(), batch["ids"].tolist(), strict=True)]
            features["ids"] = [[*(i for i in ids if i != pad), mask][-self.net.max_length :] for ids in texts]
            batch = {**self.head.collate(items_of(features), self.tokenizer), "rows": torch.tensor(rows.tolist())}
        return self.head.predict(self.net, on_device(batch, self.device), self.tokenizer, options)

    def gradient(self, rows: Index) -> Finding:
        """Compare the gradient of the mean loss, accumulated over several batches, with that of the rows one by one."""
        expected = self._gradient(one_by_one(rows.tolist()), EXACT)
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        compared = Comparison()
        for batches in ACCUMULATIONS:
            cuts = np.arange(1, batches) ** 2 * len(rows) // batches**2  # equal sizes hide a mean of means
            parts = [part for part in np.split(rows, cuts) if len(part)]
            off = [(a.to(EXACT) - b).norm() for a, b in zip(self._gradient(parts), expected, strict=True)]
            sizes = " + ".join(str(len(part)) for part in parts)
            where = functools.partial("accumulation {}, of {} rows".format, len(parts), sizes)
            compared.add(float(torch.stack(off).norm() / norm.clamp(min=1e-12)), where)
        return compared.finding("gradient", f"norm {norm:.6g}")

    def _gradient(self, batches: Batches, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the gradient of the summed losses over the summed counts, by parameter, added in ``dtype``."""
        parameters = [p for module in (self.net, self.head) for p in module.parameters() if p.requires_grad]
        sums = [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters]
        count = 0.0
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent layers have no gradient in eval mode
            for batch in batches:
                found = self.head.loss(self.net, self.batch(batch))
                parts = torch.autograd.grad(found.total, parameters, allow_unused=True)
                for total, part in zip(sums, parts, strict=True):
                    if part is not None:
                        total += part
                count += float(found.count)
        return [total / max(count, 1) for total in sums]


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative for values above 1."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    off = (found - expected).abs().nan_to_num(0.0) / expected.abs().nan_to_num(0.0).clamp(min=1)
    return float(off.max()) if off.numel() else 0.0


def shown_rows(batch: Index) -> str:
    """Return rows as findings show them."""
    most = 8
    names = ", ".join(map(str, batch[:most].tolist()))
    return f"rows {names}" + (f" and {len(batch) - most} more" if len(batch) > most else "")


def shown(value: Tensor) -> str:
    """Return a metric's value as findings show it."""
    return f"{float(value):.6g}" if value.numel() == 1 else " x ".join(map(str, value.shape))
