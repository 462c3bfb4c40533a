"""Properties of heads from rows to the loss: a sum over items, to which padding and neighbours add nothing."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llmkit.contracts import Batch, Head, Loss, Topology
from llmkit.sequence import DecodingOptions
from llmkit.testing import modules
from llmkit.testing.head.subject import (
    CONTEXT,
    TOKENIZER,
    Column,
    ContractNetwork,
    Subject,
    close_to,
    items_of,
    sums,
)
from llmkit.testing.numerics import alike
from llmkit.testing.report import NotApplicable, Properties, Violation, raised

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "the class's declarations are valid",
    "The framework does not know what the head reads, or which network it needs.",
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
    for name in ("inputs", "targets", "texts", "classes"):
        value = getattr(cls, name, None)
        if not isinstance(value, tuple) or not all(isinstance(field, str) for field in value):
            hint = ". A tuple of one is written ('text',)" if isinstance(value, str) else ""
            raise Violation(f"{name} is {value!r}, expected a tuple of field names{hint}")
    if not cls.inputs:
        raise Violation("inputs is empty: there is nothing to predict from")
    if set(cls.inputs) & set(cls.targets):
        raise Violation(f"{', '.join(set(cls.inputs) & set(cls.targets))}: both in inputs and in targets")
    unknown = {*cls.texts, *cls.words} - {*cls.inputs, *cls.targets}
    if unknown:
        raise Violation(f"{', '.join(sorted(unknown))}: in texts or words, but neither in inputs nor in targets")
    unknown = {*cls.classes} - {*cls.targets}
    if unknown:
        raise Violation(f"{', '.join(sorted(unknown))}: in classes, but not in targets")
    if not isinstance(cls.decoding, DecodingOptions):
        raise Violation(f"decoding is {cls.decoding!r}, expected DecodingOptions")
    monitor = cls.monitor
    if not (isinstance(monitor, tuple) and len(monitor) == 2 and monitor[1] in ("min", "max")):
        raise Violation(f"monitor is {monitor!r}, expected the name of a metric, and 'min' or 'max'")
    return f"{cls.topology}, {cls.layout}; reads {', '.join(cls.inputs)}; targets {', '.join(cls.targets) or 'none'}"


@PROPERTIES(
    "what it learns from the training rows is restored from JSON",
    "A checkpoint has lost its labels, or has them in another order.",
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
    except Exception:  # the next property reports it
        return ""
    try:
        after = third.encode(copy.deepcopy(subject.columns), TOKENIZER, CONTEXT)
    except Exception as error:
        raise Violation(f"after info and set_info, {text:.80}, encode {raised(error)}; is info complete?") from error
    if before != after:
        raise Violation(f"after info and set_info, {text:.80}, rows are encoded differently; is info complete?")
    return f"{len(text)} characters" if text != "{}" else "nothing to learn"


def _unfit(subject: Subject, what: str, error: Exception) -> str:
    """Return the message for a head that raises on the rows it gets here."""
    message = f"{what} {raised(error)}, on {subject.shown(0)}"
    return message if subject.rows else f"{message}. If its fields mean something else, pass rows={{field: [values]}}"


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
        raise Violation("encode modifies the rows it receives")
    _check_features(features, count)
    for index in range(count):
        alone = head.encode({name: [values[index]] for name, values in rows.items()}, TOKENIZER, CONTEXT)
        for name, values in features.items():
            if alone.get(name) != [values[index]]:
                raise Violation(
                    f"feature '{name}' of {subject.shown(index)} is {values[index]!r:.80} in a batch of {count}, and "
                    f"{alone.get(name)!r:.80} alone"
                )
    try:
        _check_features(head.encode(subject.inputs, TOKENIZER, CONTEXT), count)
    except KeyError as error:
        raise Violation(
            f"without targets encode raised KeyError: {error}; targets are missing when predicting"
        ) from error
    if head.layout == "blocks" and "ids" not in features:
        raise Violation(f"layout is 'blocks', but there is no feature 'ids', only {', '.join(features)}")
    return f"features {', '.join(features)}"


def _check_features(features: Any, count: int) -> None:
    if not isinstance(features, dict) or not features:
        raise Violation(f"encode gave {type(features).__name__}, expected a non-empty dict of features")
    for name, values in features.items():
        if len(values) != count:
            raise Violation(f"feature '{name}' has {len(values)} values for {count} rows")
        for value in values:
            numbers = value if isinstance(value, list) else [] if isinstance(value, str) else [value]
            wrong = [number for number in numbers if type(number) is not int]
            if wrong:
                detail = f"{wrong[0]!r:.40} ({type(wrong[0]).__name__}), expected ints or a string"
                raise Violation(f"feature '{name}' holds {detail}")
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
                detail = f"is a {type(value).__name__}, expected a tensor or a list of strings"
                raise Violation(f"'{name}' of a batch of {len(items)} {detail}")
        if given != items:
            raise Violation("collate modifies the features it receives, which are used again")
    sizes = {name: tuple(value.shape) if isinstance(value, Tensor) else len(value) for name, value in batch.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


PROPERTIES.all.append(modules.weights_are_set)


@PROPERTIES(
    "the loss is a finite sum with a count, in eval and in training mode",
    "Training stops at the first step.",
    essential=True,
)
def loss(subject: Subject) -> str:
    net = subject.backbone()
    for training in (False, True):
        head = subject.head().train(training)
        net.train(training)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(subject.seed)
            found = head.loss(ContractNetwork(net), subject.batch(subject.items, head=head))
        mode = "in training mode" if training else "in eval mode"
        if not isinstance(found, Loss):
            raise Violation(f"loss gave {type(found).__name__}, expected Loss(total, count)")
        for name, value in (("total", found.total), ("count", found.count)):
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise Violation(f"loss.{name} is {value!r:.60}, expected a tensor of one number")
        if not torch.isfinite(found.total):
            raise Violation(f"{mode} loss.total is {found.total.item()}")
        if found.count <= 0:
            raise Violation(f"{mode} loss.count is {float(found.count):g} for {len(subject.items)} rows")
        if not found.total.requires_grad:
            raise Violation(f"{mode} loss.total has no gradient; computed under no_grad, or detached?")
        if found.count.requires_grad:
            raise Violation(f"{mode} loss.count has a gradient, but should be a number of tokens or examples")
    return f"{float(found.total.detach() / found.count):.3g} a token or example"


@PROPERTIES(
    "each row gets a JSON-able answer that needs only its inputs",
    "llmkit predict fails, or its output lines do not match the input lines.",
    essential=True,
)
def answers(subject: Subject) -> str:
    head, count = subject.ready, len(next(iter(subject.inputs.values())))
    found = subject.predict(subject.inputs)
    if not isinstance(found, list) or len(found) != count:
        raise Violation(f"{count} rows got {len(found)} answers")
    for index, answer in enumerate(found):
        if not isinstance(answer, dict):
            raise Violation(f"{subject.shown(index)}: the answer is a {type(answer).__name__}, expected a dict")
        try:
            json.dumps(answer, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Violation(f"{subject.shown(index)}: {answer!r:.100} is not JSON: {error}") from error
        if not isinstance(head.show(answer), str):
            raise Violation(f"show gave {type(head.show(answer)).__name__}, expected text")
    if head.targets:
        for index, (answer, other) in enumerate(zip(found, subject.predict(subject.columns), strict=False)):
            if not alike(answer, other):
                raise Violation(f"{subject.shown(index)}: the answer is {answer!r:.80}, but with targets {other!r:.80}")
    items = subject.items[-1:] if head.layout == "blocks" else subject.items
    with torch.inference_mode():
        sample = head.sample(subject.net, subject.batch(items), TOKENIZER)
    if not (sample is None or isinstance(sample, str)):
        raise Violation(f"sample gave {type(sample).__name__}, expected text or None")
    return f"with {', '.join(found[0])}"


@PROPERTIES(
    "repeating an item multiplies loss and count",
    "The reported loss depends on the batch size, and gradient accumulation does not equal one large batch.",
)
def loss_is_a_sum(subject: Subject) -> None:
    for index, alone in enumerate(subject.losses):
        for copies in (2, 3):
            found = subject.loss(*[index] * copies)
            if not close_to(found, (copies * alone[0], copies * alone[1])):
                raise Violation(
                    f"{subject.shown(index)}: loss {sums(alone)} alone, {sums(found)} for {copies} copies; a mean "
                    "(reduction='mean') instead of a sum?"
                )


@PROPERTIES(
    "an item's loss is the same in any batch: padding and neighbours do not count",
    "Training depends on which rows share a batch, and the longest row of a batch sets the weight of the others.",
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
                f"{subject.shown(*group)} as one batch: loss {sums(found)}; one by one {sums(expected)}. {cause}"
            )


@PROPERTIES(
    "the content of padding does not matter",
    "Padding is read, and the longest row of a batch decides how much of it.",
)
def padding_value(subject: Subject) -> None:
    other = subject.backbone()
    with torch.no_grad():
        other.embedding.weight[TOKENIZER.pad_id] += 1
    net = ContractNetwork(other, subject.net.output_weight_VD)
    last = len(subject.items) - 1
    if any(not close_to(subject.loss(index, net=net), alone) for index, alone in enumerate(subject.losses)):
        raise NotApplicable("pad_id has a meaning in rows without padding")
    for group in ([0, last], list(range(last + 1))):
        found, expected = subject.loss(*group, net=net), subject.loss(*group)
        if not close_to(found, expected):
            raise Violation(
                f"{subject.shown(*group)}: loss {sums(expected)}, but {sums(found)} with another embedding of pad_id. "
                "Does Sequence.of get the segments, and are targets of padding IGNORE?"
            )


@PROPERTIES(
    "the last block of a split, which is padded without segments, counts only its text",
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
            f"{subject.shown(*group)}, the first one padded: loss {sums(found)}; one by one {sums(expected)}"
        )


@PROPERTIES(
    "evaluate and predict change neither weights nor gradients nor batches",
    "Training continues differently after a validation than without one.",
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
            raise Violation(f"'{name}' is modified by evaluate or predict")
    for name, parameter in both.named_parameters():
        if parameter.grad is not None:
            raise Violation(f"'{name}' has a gradient after evaluate and predict")
    for name, value in batch.items():
        if not (torch.equal(value, kept[name]) if isinstance(value, Tensor) else value == kept[name]):
            raise Violation(f"evaluate modifies '{name}' of the batch in place")
    if net.training or head.training:
        raise Violation("evaluate or predict leaves it in training mode")


def _inputs(subject: Subject, head: Head) -> Batch:
    return head.collate(items_of(head.encode(subject.inputs, TOKENIZER, CONTEXT)), TOKENIZER)
