"""How the framework builds and calls a plugin: what the shared properties know of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from llmkit import sequence
from llmkit.testing.numerics import TOLERANCE

WIDTHS = (16, 32, 24, 48, 64, 128)
CONTEXT = 40  # the length that every usage can take

Map = Callable[[Tensor], Tensor]


class Inputs(Protocol):
    """What a module is called with."""

    def to(self, kind: torch.dtype | str) -> Self:
        """Return the same in another dtype or on another device."""

    def leaves(self) -> list[Tensor]:
        """Return the tensors that gradients are taken for."""

    def select(self, y: Tensor) -> Tensor:
        """Return the part of an output that means something: that of the positions that are not padding."""


@dataclass(frozen=True)
class Columns:
    """Inputs of a layer: a sequence of vectors, and an encoder's memory for cross-attention.

    Attributes:
        x_BTD: the vectors.
        seq: their positions, segments and padding.
        memory: the memory, if the layer reads one.
    """

    x_BTD: Tensor
    seq: sequence.Sequence
    memory: sequence.Memory | None = None

    def to(self, kind: torch.dtype | str) -> Self:
        """Return the same in another dtype or on another device."""
        return self._mapped(lambda x: x.to(kind), None if isinstance(kind, torch.dtype) else lambda mark: mark.to(kind))

    def strided(self) -> Self:
        """Return the same numbers in a transposed memory layout."""
        return self._mapped(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))

    def clone(self) -> Self:
        """Return a copy."""
        return self._mapped(torch.clone, torch.clone)

    def _mapped(self, vectors: Map, marks: Map | None = None) -> Self:
        """Return what two functions make of the vectors, and of the positions and segments."""

        def mapped(seq: sequence.Sequence) -> sequence.Sequence:
            if marks is None:
                return seq
            segments = None if seq.segments_BT is None else marks(seq.segments_BT)
            return sequence.Sequence(marks(seq.positions_BT), segments, seq.position)

        memory = self.memory and sequence.Memory(vectors(self.memory.x_BSD), mapped(self.memory.seq))
        return dataclasses.replace(self, x_BTD=vectors(self.x_BTD), seq=mapped(self.seq), memory=memory)

    def tensors(self) -> list[Tensor]:
        """Return all tensors in it."""
        seqs = [self.seq] if self.memory is None else [self.seq, self.memory.seq]
        marks = [mark for seq in seqs for mark in (seq.positions_BT, seq.segments_BT) if mark is not None]
        return [*self.leaves(), *marks]

    def leaves(self) -> list[Tensor]:
        """Return the vectors, and those of the memory."""
        return [self.x_BTD] if self.memory is None else [self.x_BTD, self.memory.x_BSD]

    def select(self, y: Tensor) -> Tensor:
        """Return the rows (N, D) of real positions; where a row's memory is nothing but padding, none are."""
        seq = self.seq if self.memory is None else self.memory.seq
        if seq.segments_BT is None:
            return y
        real = seq.segments_BT > 0
        return y[real if self.memory is None else real.any(-1)]


I = TypeVar("I", bound=Inputs)  # noqa: E741


class Usage(ABC, Generic[I]):
    """One way the framework builds and calls a plugin."""

    label: str = ""
    """Which one it is, in messages: ``role causal``."""
    tolerance: ClassVar[float] = TOLERANCE
    """Largest difference of equal results in double precision, relative to the largest value."""
    rounding: ClassVar[tuple[float, float]] = (0.5, 0.1)
    """In bfloat16 this share of the positions has at most this relative error. Not all of them: rounding may turn a
    hard choice, of an expert say, at a few positions."""
    allows_zero_gradients: ClassVar[bool] = False

    @abstractmethod
    def raw(self) -> nn.Module:
        """Return a new module as the framework builds it."""

    @abstractmethod
    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """Return a module in eval mode without constant weights; another ``seed`` gives other weights."""

    @abstractmethod
    def inputs(self, batch: int, length: int, number: int = 0) -> I:
        """Return inputs in double precision; another ``number`` gives others."""

    @abstractmethod
    def outputs(self, module: nn.Module, inputs: I) -> dict[str, Tensor]:
        """Return by name what the module computes. Raises Violation for a wrong shape, and for NaN."""

    def results(self, module: nn.Module, inputs: I) -> dict[str, Any]:
        """Return the outputs without gradients, and what else a user sees of them."""
        with torch.no_grad():
            return dict(self.outputs(module, inputs))

    def kinds(self) -> list[I]:
        """Return small inputs of each kind that the network passes (dense, packed, padded)."""
        return [self.inputs(1, 3)]

    def low_precision(self) -> tuple[Usage[I], list[I]]:
        """Return the usage and the inputs that bfloat16 is compared in."""
        return self, self.kinds()

    def restored(self, module: nn.Module) -> nn.Module:
        """Return a new module with the weights of another, as a checkpoint is loaded."""
        fresh = self.build(seed=1)
        fresh.load_state_dict(module.state_dict())
        return fresh

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that a built module has to have."""
        return {}

    def rounding_hint(self) -> str:
        """Return a likely cause of noise in bfloat16, or nothing."""
        return ""

    def hint(self, module: nn.Module) -> str:
        """Return a likely cause of an error that depends on the input's shape, or nothing."""
        return ""


class Subject(Protocol):
    """A plugin of a family of modules."""

    @property
    def usages(self) -> Sequence[Usage[Any]]:
        """The ways the framework uses it."""


S = TypeVar("S", bound=Subject)


def first_that_builds(make: Callable[[int], S], dim: int | None) -> S:
    """Return what ``make`` gives for ``dim`` or else for the first usual width that the plugin can be built with."""
    for width in WIDTHS if dim is None else ():
        candidate = make(width)
        try:
            for usage in candidate.usages:
                usage.build()
        except Exception:  # the property ``builds`` reports it
            continue
        return candidate
    return make(dim or WIDTHS[0])
