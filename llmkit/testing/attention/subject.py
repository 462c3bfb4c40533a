"""An attention variant under examination, and what is asked of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence
from llmkit.testing.attention.cases import Segments, sequence
from llmkit.testing.report import NotApplicable

Reference = Callable[[Attention, Tensor, Sequence, Memory | None], Tensor]
"""(module, x_BTD, seq, memory) -> (B, T, D): a slow, plain form of a variant, right at the real positions."""

WIDTHS = (16, 32, 24, 48, 64, 128)


@dataclass(frozen=True)
class Subject:
    """An attention variant under examination.

    Attributes:
        factory: builds it from (dim, role).
        dim: the width it is built with.
        seed: of weights and inputs.
        reference: a slow form of it, if there is one.
        compile_backend: of torch.compile; None leaves that property out.
    """

    factory: Callable[..., Attention]
    dim: int
    seed: int = 0
    reference: Reference | None = None
    compile_backend: str | None = "inductor"

    @property
    def declared(self) -> frozenset[Any]:
        """What the class says it can be built as."""
        target: Any = getattr(self.factory, "func", self.factory)
        found: frozenset[Any] = target.roles
        return found

    @property
    def roles(self) -> list[Role]:
        """The roles there are that it can be built as, the causal one first."""
        order: tuple[Role, ...] = ("causal", "bidirectional", "cross")
        return [role for role in order if role in self.declared]

    def build(self, role: Role, dtype: torch.dtype = torch.float64, **arguments: Any) -> Attention:
        """Return a module in eval mode whose weights are all away from zeros and ones."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            module = self.factory(self.dim, role, **arguments)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    # Weights that start at zero or one hide what they do.
                    width = parameter.shape[-1] if parameter.dim() > 1 else 4
                    parameter.add_(0.4 * torch.randn(parameter.shape) / width**0.5)
        return module.to(dtype).eval()

    def x(self, batch: int, length: int, number: int = 0) -> Tensor:
        """Return inputs (batch, length, dim) in double precision; another ``number`` gives others."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randn(batch, length, self.dim, generator=generator, dtype=torch.float64)


def subject(
    factory: functools.partial[Any],
    *,
    dim: int | None = None,
    seed: int = 0,
    reference: Reference | None = None,
    compile_backend: str | None = "inductor",
) -> Subject:
    """Return what is examined; without ``dim`` it has the first usual width that the variant can be built with."""
    found = Subject(factory, dim or WIDTHS[0], seed, reference, compile_backend)
    for width in WIDTHS if dim is None else ():
        candidate = Subject(factory, width, seed, reference, compile_backend)
        try:
            for role in candidate.roles:
                candidate.build(role)
        except Exception:  # what is wrong is told by the first property
            continue
        return candidate
    return found


def memory_of(subject: Subject, segments: Segments | None, batch: int, length: int) -> Memory:
    """Return an encoder's output with these segments."""
    x = subject.x(batch, length, 7)
    return Memory(x, sequence(segments, length=length))


def plain(subject: Subject, role: Role, batch: int, length: int) -> Memory | None:
    """Return the memory that a role needs on dense input."""
    return memory_of(subject, None, batch, max(1, length - 1)) if role == "cross" else None


def own(subject: Subject) -> list[Role]:
    """Return the roles in which a variant looks at its own sequence."""
    return [role for role in subject.roles if role != "cross"]


def need(subject: Subject, role: Role) -> None:
    """Raise NotApplicable unless the variant can be built as ``role``."""
    if role not in subject.roles:
        raise NotApplicable(f"it cannot be built as '{role}'")


def cast(memory: Memory | None, dtype: torch.dtype) -> Memory | None:
    """Return a memory in another dtype."""
    return None if memory is None else Memory(memory.x_BSD.to(dtype), memory.seq)
