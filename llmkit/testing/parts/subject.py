"""A position encoding, feedforward network or norm under test."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit import registry
from llmkit.contracts import Feedforward, Norm, Position
from llmkit.sequence import Sequence
from llmkit.testing import modules
from llmkit.testing.numerics import disturb, normal, same, seeded
from llmkit.testing.report import NotApplicable, Properties, Violation
from llmkit.testing.usage import CONTEXT, Columns, Usage, first_that_builds

HEADS = 2
KINDS: dict[type[nn.Module], tuple[str, ...]] = {
    Position: ("add", "rotate", "bias"),
    Feedforward: ("forward",),
    Norm: ("forward",),
}
"""The methods of each contract that compute something."""


@dataclass(frozen=True)
class Subject(Usage[Columns]):
    """A position encoding, feedforward network or norm under test. The framework uses it in a single way.

    Attributes:
        factory: builds it from (dim), a position encoding from (dim, max_length).
        dim: the width it is built with.
        seed: of weights and inputs.
        context: the ``max_length`` of position encodings.
        num_heads: of the attention, for position encodings that are built for a number of them.
    """

    tolerance: ClassVar[float] = 1e-9
    rounding: ClassVar[tuple[float, float]] = (0.75, 0.05)

    factory: functools.partial[Any]
    dim: int
    seed: int = 0
    context: int = CONTEXT
    num_heads: int = HEADS

    @property
    def usages(self) -> Several[Usage[Columns]]:
        """The one way it is used."""
        return (self,)

    @property
    def contract(self) -> type[nn.Module]:
        """The contract that it derives from."""
        return next(kind for kind in KINDS if issubclass(registry.target_of(self.factory), kind))

    @property
    def methods(self) -> list[str]:
        """The methods that it defines. Raises NotApplicable for a position encoding without any."""
        own, kind = registry.target_of(self.factory), self.contract
        found = [name for name in KINDS[kind] if getattr(own, name) is not getattr(kind, name)]
        if not found:
            raise NotApplicable("it defines none of add, rotate and bias")
        return found

    def raw(self) -> Any:
        """Return a module as the framework builds it."""
        if self.contract is not Position:
            return self.factory(self.dim)
        takes = inspect.signature(registry.target_of(self.factory)).parameters
        return self.factory(self.dim, self.context, **({"bias_heads": self.num_heads} if "bias_heads" in takes else {}))

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """Return a module in eval mode without constant weights."""
        with seeded(self.seed + seed):
            module = self.raw()
            disturb(module)
        return module.to(dtype).eval()

    def attributes(self) -> dict[str, Any]:
        """Return its width."""
        return {"dim": self.dim}

    def kinds(self) -> list[Columns]:
        """Return dense inputs."""
        return [self.inputs(1, 8)]

    def low_precision(self) -> tuple[Usage[Columns], list[Columns]]:
        """Return far positions for position encodings: angles and distances must not be computed in bfloat16.

        It has 8 bits: next to 1000 its closest numbers are 996 and 1004.
        """
        if self.contract is not Position:
            return self, self.kinds()
        far = dataclasses.replace(self, context=1000)
        return far, [far.inputs(1, far.context)]

    def rounding_hint(self) -> str:
        """Return a likely cause of noise in bfloat16."""
        cause = ". Angles or distances in bfloat16? Buffers are cast along with the module"
        return cause if self.contract is Position else ""

    def x(self, *shape: int, number: int = 0) -> Tensor:
        """Return vectors of this shape in double precision; another ``number`` gives others."""
        return normal(*shape, seed=1000 * self.seed + number)

    def vectors(self, batch: int, length: int, number: int = 0) -> Tensor:
        """Return vectors (batch, length, dim)."""
        return self.x(batch, length, self.dim, number=number)

    def inputs(self, batch: int, length: int, number: int = 0) -> Columns:
        """Return vectors at the positions from 0."""
        return Columns(self.vectors(batch, length, number), Sequence.dense(length))

    def heads(self, x_BTD: Tensor) -> Tensor:
        """Return the same numbers as heads of an even width, (B, H, T, E)."""
        width = max(2 * HEADS, self.dim - self.dim % (2 * HEADS))
        even_BTD = torch.cat([x_BTD] * 4, -1)[..., :width]
        return even_BTD.reshape(*x_BTD.shape[:2], HEADS, -1).transpose(1, 2)

    def outputs(self, module: Any, inputs: Columns) -> dict[str, Tensor]:
        """Return what each method computes. Raises Violation for a wrong shape, and for NaN."""
        x_BTD, seq = inputs.x_BTD, dataclasses.replace(inputs.seq, memo={})
        found = {}
        for name in self.methods:
            if name == "bias":
                found[name] = bias(module, seq.positions_BT, seq.positions_BT, HEADS)
                continue
            given = self.heads(x_BTD) if name == "rotate" else x_BTD
            extra = {"add": (seq.positions_BT,), "rotate": (seq,), "forward": ()}[name]
            found[name] = checked(name, given, getattr(module, name)(given, *extra))
        return found

    def outputs_of(self, module: Any, x_BTD: Tensor, seq: Sequence | None = None) -> dict[str, Tensor]:
        """Return what each method computes from vectors; without ``seq`` they stand at the positions from 0."""
        return self.outputs(module, Columns(x_BTD, Sequence.dense(x_BTD.shape[1]) if seq is None else seq))


def subject(factory: functools.partial[Any], *, dim: int | None = None, seed: int = 0) -> Subject:
    """Return the subject; without ``dim`` it has the first usual width that the plugin can be built with."""
    return first_that_builds(lambda width: Subject(factory, width, seed), dim)


def first_properties() -> Properties[Subject]:
    """Return the properties that all three families begin with; the others make no sense without them."""
    stable = (dataclasses.replace(found, essential=True) for found in (modules.deterministic, modules.layout_of_inputs))
    return Properties(modules.builds, modules.weights_are_set, modules.shape, *stable)


def last_properties() -> Properties[Subject]:
    """Return the properties that all three families end with."""
    return Properties(
        modules.gradients, modules.every_parameter_learns, modules.bfloat16, modules.state_dict, modules.meta_device
    )


def bias(module: Position, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor:
    """Return a position bias. Raises Violation unless it is finite and has the shape (B or 1, H, T, S)."""
    found = module.bias(query_BT, key_BS, num_heads)
    batch = max(len(query_BT), len(key_BS))
    shape = (num_heads, query_BT.shape[1], key_BS.shape[1])
    if found is None:
        return torch.zeros(1, *shape)
    call = f"bias of {shape[1]} queries, {shape[2]} keys, {num_heads} heads, batch {batch}"
    if not isinstance(found, Tensor):
        raise Violation(f"{call}: got {type(found).__name__}, expected a tensor")
    if found.dim() != 4 or found.shape[0] not in (1, batch) or found.shape[1:] != shape:
        raise Violation(f"{call}: got the shape {tuple(found.shape)}, expected (1 or {batch}, {str(shape)[1:]}")
    if not found.is_meta and not torch.isfinite(found).all():
        raise Violation(f"{call}: it is not finite")
    return found


def checked(name: str, given: Tensor, y: Any) -> Tensor:
    """Return an output. Raises Violation unless it is finite and has the input's shape."""
    call = f"{name} of {tuple(given.shape)}, {given.dtype}"
    if not isinstance(y, Tensor):
        raise Violation(f"{call}: got {type(y).__name__}, expected a tensor of that shape")
    if y.shape != given.shape:
        raise Violation(f"{call}: got the shape {tuple(y.shape)}")
    if not y.is_meta and not torch.isfinite(y).all():
        raise Violation(f"{call}: the output is not finite")
    return y


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], message: str) -> None:
    """Raise Violation, with the difference in ``message``, unless all outputs are equal."""
    for name, y in actual.items():
        same(y, expected[name], f"{name}: {message}".format, Subject.tolerance)
