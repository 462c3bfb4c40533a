"""What every head owes its users, whatever its task: sums over items, padding that does not count, honest metrics."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from llmkit import registry
from llmkit.backbone import Backbone
from llmkit.contracts import (
    IGNORE,
    Batch,
    DecodingOptions,
    Head,
    Loss,
    Memory,
    Network,
    Sequence,
    Stage,
    State,
    Tokenizer,
    Topology,
    padded,
    segments_of,
)
from llmkit.metrics import MeanLoss
from llmkit.testing.attention.cases import gap
from llmkit.testing.parts import MarkedMemory, check_weights_are_set, disturb, seeded, zero_gradients
from llmkit.testing.report import NotApplicable, Properties, Violation

CONTEXT = 64
TOLERANCE = 1e-5
Rows = Mapping[str, list[Any]]
Items = list[dict[str, Any]]
Reference = Callable[[Head, Network, dict[str, Any], Tokenizer], tuple[float, float]]
"""(head, net, row, tokenizer) -> (total, count): the loss of one row by plain means."""

CONTEXTS = [
    "Ann is in Rome.",
    "Bob is in Oslo.",
    "Ann Lee sleeps. Bob does not sleep, he reads a book about foxes. The lazy dog is in the garden. It sleeps too.",
    "我爱北京。",
    "The dog sleeps.",
]
FIELDS: dict[str, list[Any]] = {
    "text": ["a [MASK]", "b [MASK]", "one [MASK] step", "Zwölf 狐 [MASK]", "one text, longer than all [MASK] others"],
    "label": ["neg", "pos", "neg", "meh", "pos"],
    "source": ["a b", "c d", "ein Schritt", "我爱学习", "ein Satz, länger als alle anderen"],
    "target": ["A B", "C D", "a step", "I love to learn", "one sentence, longer than all others"],
    "document": [
        "a b. c",
        "d e. f",
        "The fox jumps. It is quick.",
        "我爱学习。狐狸。",
        "A text of three. Sentences. All short.",
    ],
    "summary": ["a b", "d e", "A fox jumps", "学习", "three short sentences"],
    "tokens": [
        ["Ann"],
        ["Bob"],
        ["Ann", "Lee", "is", "in", "Rome"],
        ["我", "爱", "北", "京"],
        ["the", "dog", "of", "Bob", "Stone", "barks", "at", "us", "in", "Oslo"],
    ],
    "tags": [
        ["B-PER"],
        ["B-PER"],
        ["B-PER", "I-PER", "O", "O", "B-LOC"],
        ["O", "O", "B-LOC", "I-LOC"],
        ["O", "O", "O", "B-PER", "I-PER", "O", "O", "O", "O", "B-LOC"],
    ],
    "question": ["Where is Ann?", "Where is Bob?", "What sleeps in the garden?", "哪里？", "Who sleeps?"],
    "context": CONTEXTS,
    "answers": [
        {"text": [answer], "answer_start": [text.index(answer)]}
        for text, answer in zip(CONTEXTS, ["Rome", "Oslo", "The lazy dog", "北京", "The dog"], strict=True)
    ],
}
"""Rows for the fields that heads usually have, the smallest first; two of a kind are equally long."""


class Bytes(Tokenizer):
    """One id a byte, behind the special ones."""

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(6)
    vocab_size = 262
    trained = True

    def train(self, texts: Iterator[str]) -> None:
        """Do nothing: the bytes are the vocabulary."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return six more than each byte."""
        return [[byte + 6 for byte in text.encode()] for text in texts]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """Return the bytes as text."""
        return [bytes(i - 6 for i in row if i >= 6).decode("utf-8", "replace") for row in ids]

    def to_state(self) -> str:
        """Return an empty object."""
        return "{}"

    def from_state(self, state: str) -> None:
        """Do nothing."""


TOKENIZER = Bytes()


class ContractNetwork(Network):
    """What the contract lets a head see of a network, and nothing else. It watches the context."""

    def __init__(self, net: Backbone, output_weight_VD: Tensor | None = None) -> None:
        self._net = net
        self._output_weight_VD = net.output_weight_VD if output_weight_VD is None else output_weight_VD

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        """Run the encoder."""
        self._watch(ids_BT)
        return self._net.encode(ids_BT, seq)

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        """Run the decoder."""
        self._watch(ids_BT)
        return self._net.decode(ids_BT, seq, memory=memory, state=state)

    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        """Return empty decoding states."""
        return self._net.init_state(batch_size, max_length)

    @property
    def output_weight_VD(self) -> Tensor:
        """The output matrix."""
        return self._output_weight_VD

    @property
    def max_length(self) -> int:
        """The context."""
        return CONTEXT

    def _watch(self, ids_BT: Tensor) -> None:
        if ids_BT.shape[1] > CONTEXT:
            raise Violation(f"the network is given {ids_BT.shape[1]} columns at once, and the context is {CONTEXT}")


class Column:
    """A column that can be read again and again, but has no length and no index: training rows need not fit memory."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


@dataclass(frozen=True)
class Subject:
    """A head under examination.

    Attributes:
        factory: builds it.
        dim: width of the network.
        seed: of weights.
        rows: a few rows by field, or None for those that fit the usual fields.
        reference: the loss of one row by plain means, if there is one.
    """

    factory: functools.partial[Any]
    dim: int = 16
    seed: int = 0
    rows: Rows | None = None
    reference: Reference | None = None

    @property
    def cls(self) -> Any:
        """The class of the head."""
        return registry.target_of(self.factory)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that are read."""
        return tuple(dict.fromkeys((*self.cls.inputs, *self.cls.targets)))

    @functools.cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The rows. Raises NotApplicable where a field is not known."""
        known = FIELDS if self.rows is None else self.rows
        missing = [name for name in self.fields if name not in known]
        if missing:
            raise NotApplicable(f"rows for {', '.join(missing)} are needed: give rows={{field: [values]}}")
        return {name: list(known[name]) for name in self.fields}

    def head(self, dtype: torch.dtype = torch.float64) -> Head:
        """Return a head as the framework makes it, in eval mode, with weights that hide nothing."""
        with seeded(self.seed):
            found: Head = self.factory()
            found.learn({name: Column(values) for name, values in self.columns.items()})
            found.set_tokenizer(TOKENIZER)
            found.build(self.dim, TOKENIZER.vocab_size)
            disturb(found)
        found.decoding = self.decoding(found)
        return found.to(dtype).eval()

    @staticmethod
    def decoding(head: Head) -> DecodingOptions:
        """Return its way to generate, without chance and quickly done."""
        beams = min(head.decoding.num_beams, 2)
        return dataclasses.replace(head.decoding, temperature=0.0, max_new_tokens=4, num_beams=beams)

    def backbone(self, dtype: torch.dtype = torch.float64) -> Backbone:
        """Return a small network of the head's topology, in eval mode."""
        with seeded(self.seed):
            net = Backbone(
                vocab_size=TOKENIZER.vocab_size,
                dim=self.dim,
                num_layers=1,
                topology=self.cls.topology,
                max_length=CONTEXT,
                attention=registry.resolve("attention", None),
                cross_attention=registry.resolve("attention", None),
                position=registry.resolve("position", None),
                feedforward=registry.resolve("feedforward", None),
                norm=registry.resolve("norm", None),
            )
            disturb(net)
            for parameter in net.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)  # far from the even distribution that a new network predicts
        return net.to(dtype).eval()

    @functools.cached_property
    def net(self) -> ContractNetwork:
        """The network of most properties, in double precision."""
        return ContractNetwork(self.backbone())

    @functools.cached_property
    def ready(self) -> Head:
        """A head that all properties may use, as long as they do not change it."""
        return self.head()

    @functools.cached_property
    def items(self) -> Items:
        """The rows as items of features, with their targets."""
        return items_of(self.ready.encode(copy.deepcopy(self.columns), TOKENIZER, CONTEXT))

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """The rows without their targets."""
        return {name: copy.deepcopy(self.columns[name]) for name in self.cls.inputs}

    def told(self, *indices: int) -> str:
        """Return rows as they are named in messages."""
        rows = []
        for index in indices:
            values = [f"{name} {self.columns[name][index]!r:.60}" for name in self.inputs]
            rows.append(f"row {index} ({', '.join(values)})")
        return " and ".join(rows)

    def batch(self, items: Items, head: Head | None = None) -> Batch:
        """Return items as one batch for loss and evaluate, as the data layer makes it."""
        head = self.ready if head is None else head
        if head.layout == "examples":
            return head.collate(copy.deepcopy(items), TOKENIZER)
        rows = [item["ids"][: CONTEXT + 1] for item in items]
        batch = {
            "ids": padded([row[:-1] for row in rows], TOKENIZER.pad_id),
            "targets": padded([row[1:] for row in rows], IGNORE),
            "bytes": torch.tensor(float(sum(len(row) - 1 for row in rows))),
        }
        segments = segments_of([len(row) - 1 for row in rows])
        return batch if segments is None else {**batch, "segments": segments}

    def loss(self, *indices: int, net: Network | None = None) -> tuple[float, float]:
        """Return total and count of the loss of these items as one batch."""
        with torch.no_grad():
            found = self.ready.loss(net or self.net, self.batch([self.items[index] for index in indices]))
        return float(found.total), float(found.count)

    @functools.cached_property
    def losses(self) -> list[tuple[float, float]]:
        """Total and count of each item alone."""
        return [self.loss(index) for index in range(len(self.items))]

    @property
    def stages(self) -> list[Stage]:
        """The stages whose metrics differ; the test data have those of the validation data, or further ones."""
        same = self.ready.metrics("test").keys() == self.ready.metrics("validation").keys()
        return ["validation"] if same else ["validation", "test"]

    def added(self, indices: list[int]) -> tuple[float, float]:
        """Return total and count of these items, each alone."""
        return sum(self.losses[index][0] for index in indices), sum(self.losses[index][1] for index in indices)

    def evaluated(self, stage: Stage, parts: Iterable[list[int]]) -> dict[str, Any]:
        """Return metrics after they were updated with these items, batch by batch."""
        metrics: dict[str, Any] = self.ready.metrics(stage)
        for part in parts:
            self.evaluate(metrics, part)
        return metrics

    def evaluate(self, metrics: dict[str, Any], indices: list[int]) -> None:
        """Update metrics with these items as one batch, as Lightning does."""
        with torch.inference_mode():
            self.ready.evaluate(self.net, self.batch([self.items[index] for index in indices]), metrics, TOKENIZER)

    def predict(self, columns: Rows, head: Head | None = None) -> list[dict[str, Any]]:
        """Return the answers to rows as one batch."""
        head = self.ready if head is None else head
        with torch.inference_mode():
            items = items_of(head.encode(copy.deepcopy(dict(columns)), TOKENIZER, CONTEXT))
            return head.predict(self.net, head.collate(items, TOKENIZER), TOKENIZER, head.decoding)


def subject(
    factory: functools.partial[Any],
    *,
    dim: int | None = None,
    seed: int = 0,
    rows: Rows | None = None,
    reference: Reference | None = None,
) -> Subject:
    """Return what is examined."""
    return Subject(factory, dim or 16, seed, rows, reference)


PROPERTIES: Properties[Subject] = Properties()


def items_of(features: Mapping[str, list[Any]]) -> Items:
    """Return features column by column as items."""
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def alike(a: Any, b: Any) -> bool:
    """Return whether two answers are the same but for rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) or (a != a and b != b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


def _close(found: tuple[float, float], expected: tuple[float, float]) -> bool:
    return abs(found[1] - expected[1]) < 1e-6 * max(1, expected[1]) and math.isclose(
        found[0], expected[0], rel_tol=TOLERANCE, abs_tol=1e-7
    )


def _sum(loss: tuple[float, float]) -> str:
    return f"{loss[0]:.6g} over {loss[1]:g}"


@PROPERTIES(
    "what the class declares is valid",
    "The framework cannot tell what the head reads, or which network it needs.",
    essential=True,
)
def declares(subject: Subject) -> str:
    cls = subject.cls
    for name, allowed in (
        ("topology", get_args(Topology)),
        ("layout", ("blocks", "examples")),
        ("kept", ("start", "end")),
    ):
        if getattr(cls, name, None) not in allowed:
            raise Violation(f"{name} is {getattr(cls, name, None)!r}; allowed: {', '.join(allowed)}")
    for name in ("inputs", "targets", "texts"):
        value = getattr(cls, name, None)
        if not isinstance(value, tuple) or not all(isinstance(field, str) for field in value):
            hint = ". A tuple of one is written ('text',)" if isinstance(value, str) else ""
            raise Violation(f"{name} is {value!r}, expected a tuple of names of fields{hint}")
    if not cls.inputs:
        raise Violation("inputs is empty: there is nothing to predict from")
    if set(cls.inputs) & set(cls.targets):
        raise Violation(f"{', '.join(set(cls.inputs) & set(cls.targets))}: both in inputs and in targets")
    unknown = {*cls.texts, *cls.words} - {*cls.inputs, *cls.targets}
    if unknown:
        raise Violation(f"{', '.join(sorted(unknown))}: in texts or words, but neither in inputs nor in targets")
    if not isinstance(cls.decoding, DecodingOptions):
        raise Violation(f"decoding is {cls.decoding!r}, expected DecodingOptions")
    monitor = cls.monitor
    if not (isinstance(monitor, tuple) and len(monitor) == 2 and monitor[1] in ("min", "max")):
        raise Violation(f"monitor is {monitor!r}, expected the name of a metric, and 'min' or 'max'")
    return f"{cls.topology}, {cls.layout}; reads {', '.join(cls.inputs)}; targets {', '.join(cls.targets) or 'none'}"


@PROPERTIES(
    "what it learns from the training rows comes back from JSON",
    "A checkpoint does not know its labels, or has them in another order.",
    essential=True,
)
def learns(subject: Subject) -> str:
    columns = {name: Column(values) for name, values in subject.columns.items()}
    first, second, third = (subject.factory() for _ in range(3))
    try:
        first.learn(columns)
    except Exception as error:
        raise Violation(_unfit(subject, "learn", error)) from error
    text = json.dumps(first.info())
    second.learn(columns)
    if second.info() != first.info():
        raise Violation(f"learning twice from the same rows gave {first.info()!r:.80}, then {second.info()!r:.80}")
    third.set_info(json.loads(text))
    if json.dumps(third.info()) != text:
        raise Violation(f"info was {text:.80}, and is {json.dumps(third.info()):.80} after set_info")
    for head in (first, third):
        head.set_tokenizer(TOKENIZER)
        head.build(subject.dim, TOKENIZER.vocab_size)
    try:
        before = first.encode(copy.deepcopy(subject.columns), TOKENIZER, CONTEXT)
    except Exception:  # told by the next property
        return ""
    try:
        after = third.encode(copy.deepcopy(subject.columns), TOKENIZER, CONTEXT)
    except Exception as error:
        told = f"after info and set_info, {text:.80}, encode raised {type(error).__name__}: {error}"
        raise Violation(f"{told}; is all of it in info?") from error
    if before != after:
        raise Violation(f"after info and set_info, {text:.80}, rows are encoded otherwise; is all of it in info?")
    return f"{len(text)} characters" if text != "{}" else "nothing to learn"


def _unfit(subject: Subject, what: str, error: Exception) -> str:
    """Return what is told of a head that stops at the rows it is given here."""
    told = f"{what} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}, on {subject.told(0)}"
    return told if subject.rows else f"{told}. If its fields mean something else: give rows={{field: [values]}}"


@PROPERTIES(
    "rows become ints and lists of ints, each row as it would be alone, with or without targets",
    "Preparing the data fails, or features depend on the neighbours of a row.",
    essential=True,
)
def encodes(subject: Subject) -> str:
    head = subject.head()
    rows = copy.deepcopy(subject.columns)
    count = len(next(iter(rows.values())))
    try:
        features = head.encode(rows, TOKENIZER, CONTEXT)
    except Exception as error:
        raise Violation(_unfit(subject, "encode", error)) from error
    if rows != subject.columns:
        raise Violation("encode changes the rows that it is given")
    _check_features(features, count)
    for index in range(count):
        alone = head.encode({name: [values[index]] for name, values in rows.items()}, TOKENIZER, CONTEXT)
        for name, values in features.items():
            if alone.get(name) != [values[index]]:
                raise Violation(
                    f"feature '{name}' of {subject.told(index)} is {values[index]!r:.80} in a batch of {count}, and "
                    f"{alone.get(name)!r:.80} alone"
                )
    try:
        _check_features(head.encode(subject.inputs, TOKENIZER, CONTEXT), count)
    except KeyError as error:
        raise Violation(
            f"without targets encode raised KeyError: {error}; it has to do without when predicting"
        ) from error
    if head.layout == "blocks" and "ids" not in features:
        raise Violation(f"layout is 'blocks', and there is no feature 'ids' but only {', '.join(features)}")
    return f"features {', '.join(features)}"


def _check_features(features: Any, count: int) -> None:
    if not isinstance(features, dict) or not features:
        raise Violation(f"encode gave {type(features).__name__}, expected a dict of features that is not empty")
    for name, values in features.items():
        if len(values) != count:
            raise Violation(f"feature '{name}' has {len(values)} values for {count} rows")
        for value in values:
            numbers = value if isinstance(value, list) else [value]
            wrong = [number for number in numbers if type(number) is not int]
            if wrong:
                raise Violation(f"feature '{name}' holds {wrong[0]!r:.40} ({type(wrong[0]).__name__}), expected ints")
    for number in features.get("truncated", []):
        if number not in (0, 1):
            raise Violation(f"feature 'truncated' is {number}, expected 0 or 1")


@PROPERTIES(
    "items become a batch of tensors",
    "A batch cannot be moved to the device.",
    essential=True,
)
def collates(subject: Subject) -> str:
    head = subject.ready
    plain = items_of(head.encode(subject.inputs, TOKENIZER, CONTEXT))
    for items in (plain, plain[:1], subject.items, subject.items[:1]):
        if head.layout == "blocks" and items is not plain:
            continue  # the data layer makes these batches itself
        given = copy.deepcopy(items)
        batch = head.collate(given, TOKENIZER)
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise Violation(f"'{name}' of a batch of {len(items)} is {type(value).__name__}, expected a tensor")
        if given != items:
            raise Violation("collate changes the features that it is given, and they are used again")
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())


@PROPERTIES(
    "every weight is set when it is built",
    "The first loss is NaN, on some machines and some days only.",
    essential=True,
)
def weights_are_set(subject: Subject) -> None:
    with MarkedMemory():
        head = subject.factory()
        head.learn({name: Column(values) for name, values in subject.columns.items()})
        head.set_tokenizer(TOKENIZER)
        head.build(subject.dim, TOKENIZER.vocab_size)
    check_weights_are_set(head)


@PROPERTIES(
    "the loss is a finite sum with its count, in eval and in training mode",
    "Training stops at the first step.",
    essential=True,
)
def loss(subject: Subject) -> str:
    net = subject.backbone()
    for training in (False, True):
        head = subject.head().train(training)
        net.train(training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            found = head.loss(ContractNetwork(net), subject.batch(subject.items, head=head))
        mode = "in training mode" if training else "in eval mode"
        if not isinstance(found, Loss):
            raise Violation(f"loss gave {type(found).__name__}, expected Loss(total, count)")
        for name, value in (("total", found.total), ("count", found.count)):
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise Violation(f"loss.{name} is {value!r:.60}, expected a tensor with one number")
        if not torch.isfinite(found.total):
            raise Violation(f"{mode} loss.total is {found.total.item()}")
        if found.count <= 0:
            raise Violation(f"{mode} loss.count is {float(found.count):g} for {len(subject.items)} rows")
        if not found.total.requires_grad:
            raise Violation(f"{mode} loss.total has no gradient; computed under no_grad, or detached?")
        if found.count.requires_grad:
            raise Violation(f"{mode} loss.count has a gradient: it is a number of tokens or examples")
    return f"{float(found.total.detach() / found.count):.3g} a token or example"


@PROPERTIES(
    "each row has an answer, JSON-able, that needs its inputs only",
    "llmkit predict fails, or its lines do not belong to the lines of the file.",
    essential=True,
)
def answers(subject: Subject) -> str:
    head, count = subject.ready, len(next(iter(subject.inputs.values())))
    found = subject.predict(subject.inputs)
    if not isinstance(found, list) or len(found) != count:
        raise Violation(f"{count} rows have {len(found)} answers")
    for index, answer in enumerate(found):
        if not isinstance(answer, dict):
            raise Violation(f"{subject.told(index)} is answered by a {type(answer).__name__}, expected a dict")
        try:
            json.dumps(answer, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Violation(f"{subject.told(index)}: {answer!r:.100} is no JSON: {error}") from error
        if not isinstance(head.show(answer), str):
            raise Violation(f"show gave {type(head.show(answer)).__name__}, expected text")
    if head.targets:
        for index, (answer, other) in enumerate(zip(found, subject.predict(subject.columns), strict=False)):
            if not alike(answer, other):
                raise Violation(f"{subject.told(index)} is answered by {answer!r:.80}, with targets by {other!r:.80}")
    items = subject.items[-1:] if head.layout == "blocks" else subject.items
    with torch.inference_mode():
        sample = head.sample(subject.net, subject.batch(items), TOKENIZER)
    if not (sample is None or isinstance(sample, str)):
        raise Violation(f"sample gave {type(sample).__name__}, expected text or None")
    return f"with {', '.join(found[0])}"


@PROPERTIES(
    "twice the items make twice the loss and twice the count",
    "The reported loss depends on the batch size, and gradient accumulation is not the large batch that it stands for.",
)
def loss_is_a_sum(subject: Subject) -> None:
    for index, alone in enumerate(subject.losses):
        for copies in (2, 3):
            found = subject.loss(*[index] * copies)
            if not _close(found, (copies * alone[0], copies * alone[1])):
                raise Violation(
                    f"{subject.told(index)}: loss {_sum(alone)} alone, {_sum(found)} for {copies} copies; a mean "
                    "(reduction='mean') in the place of a sum?"
                )


@PROPERTIES(
    "an item's loss is the same in any batch: padding and neighbours do not count",
    "Training depends on which rows meet in a batch, and the longest row of each decides what the others are worth.",
)
def loss_in_any_batch(subject: Subject) -> None:
    count = len(subject.items)
    pairs = [[a, b] for a in range(count) for b in range(a + 1, count)]
    everything = list(range(count))
    for group in [*pairs, everything, everything[::-1]]:
        found = subject.loss(*group)
        expected = subject.added(group)
        if not _close(found, expected):
            is_padded = any("segment" in name for name in subject.batch([subject.items[index] for index in group]))
            cause = "Padding that counts, or is read?" if is_padded else "A mean or norm over the batch?"
            raise Violation(
                f"{subject.told(*group)} as one batch: loss {_sum(found)}; one by one {_sum(expected)} in all. {cause}"
            )


@PROPERTIES(
    "what stands in the padding does not matter",
    "It is read, and the longest row of a batch decides how much of it.",
)
def padding_value(subject: Subject) -> None:
    other = subject.backbone()
    with torch.no_grad():
        other.embedding.weight[TOKENIZER.pad_id] += 1
    net = ContractNetwork(other, subject.net.output_weight_VD)
    last = len(subject.items) - 1
    if any(not _close(subject.loss(index, net=net), alone) for index, alone in enumerate(subject.losses)):
        raise NotApplicable("pad_id stands for something where nothing is padded")
    for group in ([0, last], list(range(last + 1))):
        found, expected = subject.loss(*group, net=net), subject.loss(*group)
        if not _close(found, expected):
            raise Violation(
                f"{subject.told(*group)}: loss {_sum(expected)}, and {_sum(found)} with another embedding of pad_id. "
                "Has Sequence.of its segments, and are targets of padding IGNORE?"
            )


@PROPERTIES(
    "the last block of a split, which is padded without segments, is worth what is in it",
    "Its padding counts as text.",
)
def last_block(subject: Subject) -> None:
    if subject.ready.layout != "blocks":
        raise NotApplicable("rows are not joined into blocks")
    group = [0, len(subject.items) - 1]
    batch = subject.batch([subject.items[index] for index in group])
    batch.pop("segments", None)
    with torch.no_grad():
        loss = subject.ready.loss(subject.net, batch)
    found, expected = (float(loss.total), float(loss.count)), subject.added(group)
    if not _close(found, expected):
        raise Violation(
            f"{subject.told(*group)}, the first one padded: loss {_sum(found)}; one by one {_sum(expected)}"
        )


@PROPERTIES(
    "every parameter of head and network gets a gradient from the loss",
    "A part of the weights never learns; DDP stops with unused parameters.",
)
def every_parameter_learns(subject: Subject) -> str:
    head, net = subject.head(), subject.backbone()
    both = nn.ModuleDict({"head": head, "net": net})
    found = head.loss(ContractNetwork(net), subject.batch(subject.items, head=head))
    # Zero may be right: what is added to all scores alike changes no probability.
    return ", ".join(f"that of {name} is 0" for name in zero_gradients(both, found.total))


@PROPERTIES(
    "in eval mode loss and answers are the same each time",
    "Two measurements of one checkpoint differ.",
)
def repeatable(subject: Subject) -> None:
    group = list(range(len(subject.items)))
    found = []
    for seed in (1, 2):
        with seeded(seed):
            found.append((subject.loss(*group), subject.predict(subject.inputs)))
    if not _close(found[1][0], found[0][0]):
        raise Violation(
            f"loss {_sum(found[0][0])} the first time, {_sum(found[1][0])} the second; chance in eval mode?"
        )
    for index, (a, b) in enumerate(zip(found[0][1], found[1][1], strict=False)):
        if not alike(a, b):
            raise Violation(f"{subject.told(index)} is answered by {a!r:.100}, the second time by {b!r:.100}")


@PROPERTIES(
    "evaluate and predict leave weights, gradients and batches alone",
    "Training after a validation is another one than without it.",
)
def changes_nothing(subject: Subject) -> None:
    head, net = subject.head(), subject.backbone()
    both = nn.ModuleDict({"head": head, "net": net})
    before = {name: value.clone() for name, value in both.state_dict().items()}
    batch = subject.batch(subject.items, head=head)
    kept = {name: value.clone() for name, value in batch.items()}
    for stage in subject.stages:
        head.evaluate(ContractNetwork(net), batch, head.metrics(stage), TOKENIZER)
    with torch.no_grad():
        head.predict(ContractNetwork(net), _inputs(subject, head), TOKENIZER, head.decoding)
    for name, value in both.state_dict().items():
        if not torch.equal(value, before[name]):
            raise Violation(f"'{name}' is changed by evaluate or predict")
    for name, parameter in both.named_parameters():
        if parameter.grad is not None:
            raise Violation(f"'{name}' has a gradient after evaluate and predict")
    for name, value in batch.items():
        if not torch.equal(value, kept[name]):
            raise Violation(f"evaluate changes '{name}' of the batch in place")
    if net.training or head.training:
        raise Violation("after evaluate and predict it is in training mode")


def _inputs(subject: Subject, head: Head) -> Batch:
    return head.collate(items_of(head.encode(subject.inputs, TOKENIZER, CONTEXT)), TOKENIZER)


@PROPERTIES(
    "metrics are torchmetrics, new ones each time, and the one that is monitored is a single number with a right side",
    "No best checkpoint is kept or, with the wrong side, the worst.",
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
                raise Violation(f"{stage}: metrics gives the same '{key}' each time, expected a new one")
            if not isinstance(metric.compute(), Tensor):
                raise Violation(f"{stage}: '{key}' computes a {type(metric.compute()).__name__}, expected a tensor")
        if stage == "validation":
            if name not in found:
                raise Violation(f"monitor is '{name}', and the validation metrics are {', '.join(found)}")
            if found[name].compute().numel() != 1:
                raise Violation(f"monitor is '{name}', which has the shape {tuple(found[name].compute().shape)}")
            better = (
                "min"
                if isinstance(found[name], MeanLoss)
                else {True: "max", False: "min"}.get(found[name].higher_is_better)
            )
            if better not in (None, side):
                raise Violation(
                    f"monitor is ('{name}', '{side}'), and {type(found[name]).__name__} is better at the {better}"
                )
    return ", ".join(found)


@PROPERTIES(
    "metrics do not depend on how rows are batched, and start anew after reset",
    "The same model has other figures with another batch size: those of a mean over batches.",
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
    "metrics of several processes add up to those of one",
    "The same model has other figures on two GPUs.",
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
    """Let a metric exchange its states by ``gather``, as if there were several processes."""
    for part in metric.modules():
        if isinstance(part, Metric):
            part.dist_sync_fn = gather
            part.distributed_available_fn = lambda: True


def _send(sent: list[Tensor], own: Tensor, group: Any = None) -> list[Tensor]:
    sent.append(own)
    return [own]


def _receive(others: Iterator[Tensor], own: Tensor, group: Any = None) -> list[Tensor]:
    return [own, next(others)]


def _same_metrics(found: dict[str, Any], expected: dict[str, Any], told: str) -> None:
    for name, metric in found.items():
        a, b = metric.compute().double(), expected[name].compute().double()
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()) or gap(a.nan_to_num(), b.nan_to_num()) > 1e-4:
            raise Violation(f"{told}: '{name}' is {_number(a)}; expected {_number(b)}")


def _number(value: Tensor) -> str:
    return f"{float(value):.6g}" if value.numel() == 1 else f"{value.tolist()!r:.80}"


@PROPERTIES(
    "the metric 'loss' is the mean over what the loss counts",
    "Perplexities and losses cannot be compared with those of training, or of other batch sizes.",
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
    "The answer to a text depends on what else is asked.",
)
def answers_in_any_batch(subject: Subject) -> None:
    rows = subject.inputs
    count = len(next(iter(rows.values())))
    alone = [subject.predict({name: [values[index]] for name, values in rows.items()}) for index in range(count)]
    for group in ([0, 1 % count], [0, count - 1], list(range(count)), list(range(count))[::-1]):
        found = subject.predict({name: [values[index] for index in group] for name, values in rows.items()})
        if len(found) != len(group):
            raise Violation(f"{subject.told(*group)}: {len(group)} rows have {len(found)} answers")
        for index, answer in zip(group, found, strict=True):
            if not alike([answer], alone[index]):
                others = ", ".join(str(other) for other in group if other != index)
                raise Violation(
                    f"{subject.told(index)} is answered by {answer!r:.100} together with row {others}, by "
                    f"{alone[index]!r:.100} alone. Padding that is read, or rows in another order?"
                )


@PROPERTIES(
    "rows longer than the context are cut to it",
    "A long text stops training, or the network gets positions that it does not know.",
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
            raise Violation("two long rows do not have two answers")


def _longer(value: Any, times: int) -> Any:
    """Return a text or list repeated; labels and marks of places stay."""
    if isinstance(value, list):
        return value * times
    return " ".join([value] * times) if isinstance(value, str) and " " in value else value


@PROPERTIES(
    "a state_dict brings all of it back into a new head",
    "A loaded checkpoint is another model than the one that was saved.",
)
def state_dict(subject: Subject) -> None:
    fresh = subject.factory()
    fresh.set_info(json.loads(json.dumps(subject.ready.info())))
    fresh.set_tokenizer(TOKENIZER)
    fresh.build(subject.dim, TOKENIZER.vocab_size)
    fresh.decoding = subject.decoding(fresh)
    fresh.double().eval().load_state_dict(subject.ready.state_dict())
    with torch.no_grad():
        found = fresh.loss(subject.net, subject.batch(subject.items, head=fresh))
    expected = subject.loss(*range(len(subject.items)))
    if not _close((float(found.total), float(found.count)), expected):
        raise Violation(f"loss {_sum(expected)} before, {float(found.total):.6g} after; a tensor that is no parameter?")
    for index, (a, b) in enumerate(
        zip(subject.predict(subject.inputs), subject.predict(subject.inputs, fresh), strict=True)
    ):
        if not alike(a, b):
            raise Violation(f"{subject.told(index)} is answered by {a!r:.100} before, by {b!r:.100} after")


@PROPERTIES(
    "bfloat16, pure and by autocast, agrees with double precision",
    "Mixed precision, the usual way to train, gives an error or noise.",
)
def bfloat16(subject: Subject) -> str:
    expected, worst = subject.loss(*range(len(subject.items))), 0.0
    for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        head = subject.head(weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = head.loss(ContractNetwork(subject.backbone(weights)), subject.batch(subject.items, head=head))
        how = "by autocast" if autocast else "with bfloat16 weights"
        error = abs(float(found.total) / expected[0] - 1)
        worst = max(worst, error)
        if not error < 0.1 or float(found.count) != expected[1]:
            raise Violation(f"{how} the loss is {_sum((float(found.total), float(found.count)))}, not {_sum(expected)}")
    return f"off by {worst:.1%}"


@PROPERTIES(
    "the loss equals its plain reference",
    "It computes something else than it says: an offset of one, a sign, a smoothing.",
)
def reference(subject: Subject) -> None:
    if subject.reference is None:
        raise NotApplicable("no reference given")
    for index, found in enumerate(subject.losses):
        row = {name: values[index] for name, values in subject.columns.items()}
        with torch.no_grad():
            total, count = subject.reference(subject.ready, subject.net, row, TOKENIZER)
        if not _close(found, (float(total), float(count))):
            raise Violation(f"{subject.told(index)}: loss {_sum(found)}, by the reference {_sum((total, count))}")
