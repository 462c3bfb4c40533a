"""A head under test: example rows, a tokenizer and a network to try it with."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llmkit import registry
from llmkit.contracts import IGNORE, Batch, Head, Network, Stage, Tokenizer
from llmkit.model.backbone import Backbone
from llmkit.sequence import DecodingOptions, Memory, Sequence, State, padded, segments_of
from llmkit.testing.head.examples import FIELDS
from llmkit.testing.numerics import disturb, seeded
from llmkit.testing.report import NotApplicable, Violation
from llmkit.testing.usage import Usage

CONTEXT = 64
TOLERANCE = 1e-5
Rows = Mapping[str, list[Any]]
Items = list[dict[str, Any]]
Reference = Callable[[Head, Network, dict[str, Any], Tokenizer], tuple[float, float]]
"""(head, net, row, tokenizer) -> (total, count): the loss of one row, computed in an obvious way."""


class Bytes(Tokenizer):
    """One id for each byte, after the special ones."""

    pad_id, bos_id, eos_id, unk_id, mask_id, sep_id = range(6)
    vocab_size = 262
    trained = True

    def train(self, texts: Iterator[str]) -> None:
        """Do nothing: the bytes are the vocabulary."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the value of each byte plus six."""
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
    """A network that offers a head only what the contract promises, and checks that inputs fit the context."""

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
    def output_bias_V(self) -> Tensor | None:
        """What is added to the scores."""
        return self._net.output_bias_V

    @property
    def max_length(self) -> int:
        """The context."""
        return CONTEXT

    def _watch(self, ids_BT: Tensor) -> None:
        if ids_BT.shape[1] > CONTEXT:
            raise Violation(f"the network received {ids_BT.shape[1]} columns at once; the context is {CONTEXT}")


class Column:
    """A column that can be read repeatedly, but has neither length nor index: training rows need not fit in memory."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


@dataclass(frozen=True)
class Subject:
    """A head under test.

    Attributes:
        factory: builds it.
        dim: width of the network.
        seed: of weights.
        rows: a few rows by field; None: the example rows above.
        reference: the loss of one row computed in an obvious way, or None.
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
        """The rows. Raises NotApplicable for a field without example rows."""
        known = FIELDS if self.rows is None else self.rows
        missing = [name for name in self.fields if name not in known]
        if missing:
            raise NotApplicable(f"no example rows for {', '.join(missing)}: pass rows={{field: [values]}}")
        return {name: list(known[name]) for name in self.fields}

    def raw(self, info: str = "") -> Head:
        """Return a head as the framework builds it, after training rows or, with ``info``, from a checkpoint."""
        found: Head = self.factory()
        if info:
            found.set_info(json.loads(info))
        else:
            found.learn({name: Column(values) for name, values in self.columns.items()})
        found.set_tokenizer(TOKENIZER)
        found.build(self.dim, TOKENIZER.vocab_size)
        found.decoding = self.decoding(found)
        return found

    def head(self, dtype: torch.dtype = torch.float64, seed: int = 0, info: str = "") -> Head:
        """Return a head in eval mode without constant weights; another ``seed`` gives other weights."""
        with seeded(self.seed + seed):
            found = self.raw(info)
            disturb(found)
        return found.to(dtype).eval()

    @property
    def usages(self) -> list[Together]:
        """The one way it is used: together with a network."""
        return [Together(self)]

    @staticmethod
    def decoding(head: Head) -> DecodingOptions:
        """Return its decoding options made deterministic and short."""
        beams = min(head.decoding.num_beams, 2)
        return dataclasses.replace(head.decoding, temperature=0.0, max_new_tokens=4, num_beams=beams)

    def backbone(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Backbone:
        """Return a small network of the head's topology, in eval mode."""
        with seeded(self.seed + seed):
            net = Backbone(
                vocab_size=TOKENIZER.vocab_size,
                dim=self.dim,
                num_layers=1,
                topology=self.factory().topology,
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
                    parameter.mul_(8)  # a new network predicts all tokens alike, which would hide differences
        return net.to(dtype).eval()

    @functools.cached_property
    def net(self) -> ContractNetwork:
        """The network of most properties, in double precision."""
        return ContractNetwork(self.backbone())

    @functools.cached_property
    def ready(self) -> Head:
        """A head shared by all properties, which must not change it."""
        return self.head()

    @functools.cached_property
    def items(self) -> Items:
        """The rows as items of features, with their targets."""
        return items_of(self.ready.encode(copy.deepcopy(self.columns), TOKENIZER, CONTEXT))

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """The rows without their targets."""
        return {name: copy.deepcopy(self.columns[name]) for name in self.cls.inputs}

    def shown(self, *indices: int) -> str:
        """Return rows as messages show them."""
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

    def predict(self, columns: Rows, head: Head | None = None, net: Network | None = None) -> list[dict[str, Any]]:
        """Return the answers to rows as one batch."""
        head = self.ready if head is None else head
        with torch.inference_mode():
            items = items_of(head.encode(copy.deepcopy(dict(columns)), TOKENIZER, CONTEXT))
            # The data layer numbers the rows.
            batch = {**head.collate(items, TOKENIZER), "rows": torch.arange(len(items))}
            return head.predict(net or self.net, batch, TOKENIZER, head.decoding)


class FirstRows(int):
    """This many of the rows, as inputs: they have a length and a dtype of their own, and no gradient."""

    def to(self, kind: torch.dtype | str) -> Self:
        """Return the same."""
        return self

    def leaves(self) -> list[Tensor]:
        """Return nothing."""
        return []

    def select(self, y: Tensor) -> Tensor:
        """Return all of it."""
        return y


@dataclass(frozen=True)
class Together(Usage[FirstRows]):
    """A head together with its network, as they are trained and saved."""

    tolerance: ClassVar[float] = TOLERANCE
    allows_zero_gradients: ClassVar[bool] = True  # what is added to all scores alike changes no probability

    subject: Subject

    def raw(self) -> nn.ModuleDict:
        """Return a head as the framework builds it, and a network."""
        return nn.ModuleDict({"head": self.subject.raw(), "net": self.subject.backbone()})

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, info: str = "") -> nn.ModuleDict:
        """Return head and network in eval mode without constant weights."""
        return nn.ModuleDict(
            {"head": self.subject.head(dtype, seed, info), "net": self.subject.backbone(dtype, seed)}
        ).eval()

    def restored(self, module: Any) -> nn.ModuleDict:
        """Return a new head and network from what a checkpoint holds."""
        fresh = self.build(seed=1, info=json.dumps(module["head"].info()))
        fresh.load_state_dict(module.state_dict())
        return fresh

    def inputs(self, batch: int, length: int, number: int = 0) -> FirstRows:
        """Return the first ``batch`` rows, or all where there are fewer."""
        return FirstRows(min(batch, len(self.subject.items)))

    def kinds(self) -> list[FirstRows]:
        """Return a few rows, some of them padded."""
        return [self.inputs(3, 0)]

    def low_precision(self) -> tuple[Usage[FirstRows], list[FirstRows]]:
        """Return all rows: the error of a loss is an average over them."""
        return self, [FirstRows(len(self.subject.items))]

    def outputs(self, module: Any, inputs: FirstRows) -> dict[str, Tensor]:
        """Return the loss, and its count as a whole number."""
        head, net = module["head"], ContractNetwork(module["net"])
        found = head.loss(net, self.subject.batch(self.subject.items[:inputs], head=head))
        return {"loss": found.total.reshape(1), "count": found.count.detach().reshape(1).round().long()}

    def results(self, module: Any, inputs: FirstRows) -> dict[str, Any]:
        """Return the loss, its count, and the answers."""
        rows = {name: values[:inputs] for name, values in self.subject.inputs.items()}
        answers = self.subject.predict(rows, module["head"], ContractNetwork(module["net"]))
        named = {f"answer to {self.subject.shown(index)}": answer for index, answer in enumerate(answers)}
        return {**super().results(module, inputs), **named}


def subject(
    factory: functools.partial[Any],
    *,
    dim: int | None = None,
    seed: int = 0,
    rows: Rows | None = None,
    reference: Reference | None = None,
) -> Subject:
    """Return the subject."""
    return Subject(factory, dim or 16, seed, rows, reference)


def items_of(features: Mapping[str, list[Any]]) -> Items:
    """Return features column by column as items."""
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def close_to(found: tuple[float, float], expected: tuple[float, float]) -> bool:
    """Return whether total and count of two losses are equal up to rounding."""
    return abs(found[1] - expected[1]) < 1e-6 * max(1, expected[1]) and math.isclose(
        found[0], expected[0], rel_tol=TOLERANCE, abs_tol=1e-7
    )


def sums(loss: tuple[float, float]) -> str:
    """Return total and count of a loss as messages show them."""
    return f"{loss[0]:.6g} over {loss[1]:g}"
