"""The same number however computed: losses, metrics, gradients and answers, however rows are put into batches.

What is compared with is one row at a time, summed in double precision, and plain computations where they are short.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit import DataModule, LanguageModel, plugin, registry
from llmkit.contracts import IGNORE, Batch, Head, Loss, Stage
from llmkit.model import step
from llmkit.model.backbone import Backbone
from llmkit.ops.decoding import generate
from llmkit.sequence import DecodingOptions
from llmkit.sequence import Sequence as Positions
from llmkit.testing.head.examples import FIELDS
from llmkit.testing.head.subject import CONTEXT, TOKENIZER, Subject, items_of, subject
from llmkit.testing.numerics import alike

ROWS = 32
"""More than the 20 that differ from each other, and any share of them is a number of single precision."""
ATTENTIONS = ("multi_head", "lstm", "linear", "sliding_window")
HEADS = tuple(registry.entries("head"))
CASES = [(head, "multi_head") for head in HEADS] + [
    (head, attention) for head in ("generation", "classification") for attention in ATTENTIONS[1:]
]
# The first failure tells enough: looking for a smaller one takes minutes.
QUICK = settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
Parts = list[list[int]]


def value_of(name: str, row: int) -> Any:
    """Return a field of a row: of very different lengths."""
    value, times = FIELDS[name][row % 5], row // 5 % 4
    if name in ("label", "score", "answers"):
        return value
    if name in ("symbols", "expected"):
        return " ".join([value] * (1 + times))
    return value * (1 + times) if isinstance(value, list) else f"{value}{' word' * times}"


class Case:
    """A head with a network in single precision, and its rows."""

    def __init__(self, head: str, attention: str) -> None:
        cls: type[Head] = registry.find("head", head).load()
        fields = dict.fromkeys((*cls.inputs, *cls.targets))
        self.columns = {name: [value_of(name, row) for row in range(ROWS)] for name in fields}
        self.subject: Subject = subject(functools.partial(cls), rows=self.columns)
        self.head: Head = self.subject.head(torch.float32)
        torch.manual_seed(0)
        self.net = Backbone(
            vocab_size=TOKENIZER.vocab_size,
            dim=16,
            num_layers=1,
            topology=cls.topology,
            max_length=CONTEXT,
            attention=plugin("attention", attention),
            cross_attention=plugin("attention", "multi_head"),
            position=plugin("position", "rotary"),
            feedforward=plugin("feedforward", "gelu"),
            norm=plugin("norm", "layer"),
        ).eval()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(2)  # further from the even distribution that a new network predicts
        self.items = items_of(self.head.encode(self.columns, TOKENIZER, CONTEXT))

    def batch(self, rows: Sequence[int], extra: int = 0) -> Batch:
        """Return rows as one batch, with more columns of padding than it needs."""
        return wider(self.subject.batch([self.items[row] for row in rows], self.head), extra)

    def loss(self, rows: Sequence[int], extra: int = 0) -> Loss:
        """Return the loss of rows as one batch."""
        return self.head.loss(self.net, self.batch(rows, extra))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.head.parameters()]

    def gradient(self, rows: Sequence[int], extra: int = 0) -> list[Tensor]:
        """Return the gradient of the summed loss of rows as one batch."""
        found = torch.autograd.grad(self.loss(rows, extra).total, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    @functools.cached_property
    def losses(self) -> list[tuple[float, float]]:
        """Total and count of each row alone."""
        with torch.no_grad():
            return [(float(found.total), float(found.count)) for found in (self.loss([row]) for row in range(ROWS))]

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        """The gradients of the rows, each alone, added in double precision."""
        sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self.parameters]
        for row in range(ROWS):
            for total, gradient in zip(sums, self.gradient([row]), strict=True):
                total += gradient
        return sums

    def measured(self, parts: Parts, stage: Stage = "validation", extra: int = 0) -> dict[str, Tensor]:
        """Return the metrics of rows, batch by batch."""
        metrics: dict[str, Any] = self.head.metrics(stage)
        with torch.inference_mode():
            for part in parts:
                self.head.evaluate(self.net, self.batch(part, extra), metrics, TOKENIZER)
        return {name: metric.compute().double() for name, metric in metrics.items()}

    @functools.cached_property
    def metrics(self) -> dict[str, Tensor]:
        """The validation metrics, one row at a time."""
        return self.measured([[row] for row in range(ROWS)])

    def answers(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return the answers to rows, asked together."""
        inputs = {name: [self.columns[name][row] for row in rows] for name in self.head.inputs}
        with torch.inference_mode():
            items = items_of(self.head.encode(inputs, TOKENIZER, CONTEXT))
            return self.head.predict(self.net, self.head.collate(items, TOKENIZER), TOKENIZER, self.head.decoding)


@functools.cache
def case(head: str, attention: str = "multi_head") -> Case:
    return Case(head, attention)


def wider(batch: Batch, extra: int) -> Batch:
    """Return the same batch with up to ``extra`` more columns of padding on each of the network's two sides."""
    read = "source" if "source" in batch else "ids"
    batch = {**batch, "segments": batch.get("segments", torch.ones_like(batch[read]))} if extra else batch
    sides: list[dict[str, int]] = [{read: TOKENIZER.pad_id, "segments": 0, "words": -1}]
    if read == "source":
        sides.append({"ids": TOKENIZER.pad_id, "targets": IGNORE})
    elif "spans" not in batch:
        sides[0]["targets"] = IGNORE
    for fills in sides:
        more = min(extra, CONTEXT - batch[next(iter(fills))].shape[1])
        for name in fills.keys() & batch.keys():
            batch = {**batch, name: F.pad(batch[name], (0, more), value=fills[name])}
    return batch


@st.composite
def batchings(draw: Callable[..., Any]) -> Parts:
    """All rows in any order, in batches of one size from 1 to all, or of several in turn."""
    order = draw(st.permutations(range(ROWS)))
    # Hypothesis begins with small numbers, and batches of one row are what is compared with.
    sizes = [ROWS + 1 - less for less in draw(st.lists(st.integers(1, ROWS), min_size=1, max_size=8))]
    parts: Parts = []
    for size in itertools.cycle(sizes):
        if not order:
            break
        parts.append(order[:size])
        order = order[size:]
    return parts


@st.composite
def splits(draw: Callable[..., Any]) -> Parts:
    """All rows in any order, cut at any places into 1 to 8 batches."""
    order = draw(st.permutations(range(ROWS)))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, ROWS - 1), max_size=7))), ROWS]
    return [order[a:b] for a, b in itertools.pairwise(cuts)]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the norm of the difference over the norm."""
    off = torch.stack([(a.double() - b).norm() for a, b in zip(found, wanted, strict=True)]).norm()
    return float(off / torch.stack([b.norm() for b in wanted]).norm())


# Losses, metrics and answers


@pytest.mark.parametrize(("head", "attention"), CASES)
@given(parts=batchings(), extra=st.integers(0, 9))
@QUICK
def test_losses_and_metrics(head: str, attention: str, parts: Parts, extra: int) -> None:
    with torch.no_grad():
        there = case(head, attention)
        for part in parts:
            found = there.loss(part, extra)
            assert float(found.count) == sum(there.losses[row][1] for row in part)
            assert float(found.total) == pytest.approx(sum(there.losses[row][0] for row in part), rel=1e-6)
    for name, value in there.measured(parts, extra=extra).items():
        # What is counted is equal to the last bit but one: sums of fractions know an order.
        least = 1e-6 if name in ("loss", "perplexity", "bits_per_byte", "mse", "pearson") else 1e-12
        least = 1e-3 if name == "spearman" else least  # equal texts get the same rank, or ranks that are next
        assert value.tolist() == pytest.approx(there.metrics[name].tolist(), rel=least, nan_ok=True), name


@pytest.mark.parametrize("head", HEADS)
@given(parts=batchings())
@settings(QUICK, max_examples=2)
def test_answers(head: str, parts: Parts) -> None:
    there = case(head)
    for part in parts[:4]:
        for row, answer in zip(part, there.answers(part), strict=True):
            assert alike([answer], there.answers([row]))


@pytest.mark.parametrize("head", ["translation", "summarization"])
def test_metrics_of_texts_that_are_written(head: str) -> None:
    there = case(head)
    rows = list(range(20))
    wanted = there.measured([[row] for row in rows], "test")
    for parts in ([rows], [rows[:7][::-1], rows[7:]]):
        assert there.measured(parts, "test", extra=5).keys() == wanted.keys()
        for name, value in there.measured(parts, "test", extra=5).items():
            assert float(value) == pytest.approx(float(wanted[name]), rel=1e-6), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_against_plain_cross_entropy(attention: str) -> None:
    there = case("generation", attention)
    total, count = 0.0, 0
    with torch.no_grad():
        for text in there.columns["text"]:
            ids = torch.tensor([TOKENIZER.encode(text)[: CONTEXT + 1]])
            hidden = there.net.decode(ids[:, :-1], Positions.dense(ids.shape[1] - 1))[0]
            total += float(F.cross_entropy(hidden @ there.net.output_weight_VD.T, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        found = there.loss(range(ROWS), 7)
    assert int(found.count) == count
    assert float(found.total) == pytest.approx(total, rel=1e-6)
    metrics = there.measured([list(range(25)), list(range(25, ROWS))])
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-6)
    assert float(metrics["perplexity"]) == pytest.approx(math.exp(total / count), rel=1e-6)
    assert float(metrics["bits_per_byte"]) == pytest.approx(total / math.log(2) / count, rel=1e-6)  # a byte a token


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_classification_against_plain_cross_entropy(attention: str) -> None:
    there = case("classification", attention)
    linear, labels = there.head.get_submodule("classifier"), ["meh", "neg", "pos"]
    total, right = 0.0, 0
    with torch.no_grad():
        for text, label in zip(there.columns["text"], there.columns["label"], strict=True):
            ids = torch.tensor([TOKENIZER.encode(text)[:CONTEXT]])
            scores = linear(there.net.encode(ids, Positions.dense(ids.shape[1])).x_BSD.mean(1))
            total += float(F.cross_entropy(scores, torch.tensor([labels.index(label)])))
            right += labels[int(scores.argmax())] == label
        found = there.loss(range(ROWS), 9)
    assert float(found.total) == pytest.approx(total, rel=1e-6)
    metrics = there.measured([list(range(ROWS))[::-1]], extra=3)
    assert float(metrics["loss"]) == pytest.approx(total / ROWS, rel=1e-6)
    assert float(metrics["accuracy"]) == right / ROWS


@pytest.mark.parametrize("attention", ["multi_head", "lstm"])
def test_a_text_that_outgrows_the_context_is_cut_by_its_own_length(attention: str) -> None:
    """Not by that of the longest one that it is written together with."""
    net = case("generation", attention).net
    prompts = [list(range(10, 10 + length)) for length in (3, 30, CONTEXT, CONTEXT + 9)]
    options = DecodingOptions(max_new_tokens=CONTEXT + 20, temperature=0.0)
    together = generate(net, prompts, options, eos_id=2)
    assert together == [generate(net, [prompt], options, eos_id=2)[0] for prompt in prompts]
    assert max(map(len, together)) > CONTEXT


# Gradients


@pytest.mark.parametrize(("head", "attention"), CASES)
@given(parts=splits(), extra=st.integers(0, 9))
@QUICK
def test_gradients(head: str, attention: str, parts: Parts, extra: int) -> None:
    """Of the mean over all tokens or examples, accumulated over 1 to 8 batches."""
    there = case(head, attention)
    count = sum(pair[1] for pair in there.losses)
    wanted = [total / count for total in there.gradients]
    sums = [torch.zeros_like(parameter) for parameter in there.parameters]
    for part in parts:
        for total, gradient in zip(sums, there.gradient(part, extra), strict=True):
            total += gradient
    assert difference([total / count for total in sums], wanted) < 1e-6


SENTENCES = [
    "a",
    "b c",
    "a long one with many more words than others have",
    "d",
    "two words",
    "e e e e e e e e e e e",
    "f",
]


class Trained:
    """Fits of a translation model to seven pairs of very different lengths; a step is always an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pairs = "".join(f"{text}\t{text[::-1] * (1 + 3 * (i % 2))}\n" for i, text in enumerate(SENTENCES))
        (folder / "pairs.tsv").write_text(f"source\ttarget\n{pairs}")

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        constant = functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
        optimizer = functools.partial(torch.optim.SGD, lr=0.5)
        return LanguageModel(
            plugin("head", "translation"), dim=16, num_layers=1, optimizer=optimizer, scheduler=constant
        )

    def data(self, batch_size: int) -> DataModule:
        return DataModule(
            train=str(self.folder / "pairs.tsv"),
            validation_share=0.0,
            tokenizer=plugin("tokenizer", "byte"),
            batch_size=batch_size,
            cache_dir=str(self.folder / "cache"),
        )

    def fit(self, batch_size: int, accumulate: int, clip: float | None) -> list[Tensor]:
        """Return the weights after five steps."""
        model = self.model()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=5,
            default_root_dir=self.folder, use_distributed_sampler=False, enable_checkpointing=False,
            accumulate_grad_batches=accumulate, gradient_clip_val=clip,
        )  # fmt: skip
        pl.seed_everything(0)
        trainer.fit(model, datamodule=self.data(batch_size))
        assert trainer.global_step == 5
        assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 5 * math.ceil(7 / batch_size)
        return [parameter.detach().double() for parameter in model.parameters()]

    def plainly(self, clip: float | None) -> list[Tensor]:
        """Return the same by a plain loop over all rows as one batch."""
        pl.seed_everything(0)
        model, data = self.model(), self.data(8)
        data.bind(model.head, model.context)
        data.setup("fit")
        model.tokenizer = data.tokenizer
        model.configure_model()
        (batch,) = list(data.train_dataloader())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            found = model.head.loss(model.network, batch)
            (found.total / found.count).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return [parameter.detach().double() for parameter in model.parameters()]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_with_accumulated_gradients(
    clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights for batches of 8, 4 + 3 and 2 + 2 + 2 + 1 rows; a mean of their means would give others."""
    trained = Trained(tmp_path)
    wanted = trained.plainly(clip)
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        assert difference(trained.fit(batch_size, accumulate, clip), wanted) < 1e-6
    add = step.GradientAccumulator.add
    monkeypatch.setattr(step.GradientAccumulator, "add", lambda self, summed, *counts: add(self, summed, 1, 1))
    assert difference(trained.fit(2, 4, clip), wanted) > 1e-3
