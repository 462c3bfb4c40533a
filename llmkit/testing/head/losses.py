"""What every head owes from rows to the loss: a sum over items in which padding and company do not count."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Loss, Topology
from llmkit.sequence import DecodingOptions
from llmkit.testing.head.subject import (
    CONTEXT,
    TOKENIZER,
    Column,
    ContractNetwork,
    Subject,
    alike,
    close_to,
    items_of,
    sums,
)
from llmkit.testing.parts import MarkedMemory, check_weights_are_set, seeded, zero_gradients
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()


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
    "rows become ints, lists of ints and strings, each row as it would be alone, with or without targets",
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
            numbers = value if isinstance(value, list) else [] if isinstance(value, str) else [value]
            wrong = [number for number in numbers if type(number) is not int]
            if wrong:
                told = f"{wrong[0]!r:.40} ({type(wrong[0]).__name__}), expected ints or a string"
                raise Violation(f"feature '{name}' holds {told}")
    for number in features.get("truncated", []):
        if number not in (0, 1):
            raise Violation(f"feature 'truncated' is {number}, expected 0 or 1")


@PROPERTIES(
    "items become a batch of tensors and lists of strings",
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
            strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
            if not (strings or isinstance(value, Tensor)):
                told = f"is a {type(value).__name__}, expected a tensor or a list of strings"
                raise Violation(f"'{name}' of a batch of {len(items)} {told}")
        if given != items:
            raise Violation("collate changes the features that it is given, and they are used again")
    sizes = {name: tuple(value.shape) if isinstance(value, Tensor) else len(value) for name, value in batch.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


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
            if not close_to(found, (copies * alone[0], copies * alone[1])):
                raise Violation(
                    f"{subject.told(index)}: loss {sums(alone)} alone, {sums(found)} for {copies} copies; a mean "
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
        if not close_to(found, expected):
            is_padded = any("segment" in name for name in subject.batch([subject.items[index] for index in group]))
            cause = "Padding that counts, or is read?" if is_padded else "A mean or norm over the batch?"
            raise Violation(
                f"{subject.told(*group)} as one batch: loss {sums(found)}; one by one {sums(expected)} in all. {cause}"
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
    if any(not close_to(subject.loss(index, net=net), alone) for index, alone in enumerate(subject.losses)):
        raise NotApplicable("pad_id stands for something where nothing is padded")
    for group in ([0, last], list(range(last + 1))):
        found, expected = subject.loss(*group, net=net), subject.loss(*group)
        if not close_to(found, expected):
            raise Violation(
                f"{subject.told(*group)}: loss {sums(expected)}, and {sums(found)} with another embedding of pad_id. "
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
    if not close_to(found, expected):
        raise Violation(
            f"{subject.told(*group)}, the first one padded: loss {sums(found)}; one by one {sums(expected)}"
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
    if not close_to(found[1][0], found[0][0]):
        raise Violation(
            f"loss {sums(found[0][0])} the first time, {sums(found[1][0])} the second; chance in eval mode?"
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
    kept = copy.deepcopy(batch)
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
        if not (torch.equal(value, kept[name]) if isinstance(value, Tensor) else value == kept[name]):
            raise Violation(f"evaluate changes '{name}' of the batch in place")
    if net.training or head.training:
        raise Violation("after evaluate and predict it is in training mode")


def _inputs(subject: Subject, head: Head) -> Batch:
    return head.collate(items_of(head.encode(subject.inputs, TOKENIZER, CONTEXT)), TOKENIZER)
