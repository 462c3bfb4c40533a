"""An attention variant under test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence
from llmkit.testing.attention.cases import Segments, run, sequence
from llmkit.testing.numerics import normal, seeded
from llmkit.testing.report import NotApplicable, Violation
from llmkit.testing.usage import Columns, Usage, first_that_builds

Reference = Callable[[Attention, Tensor, Sequence, Memory | None], Tensor]
"""(module, x_BTD, seq, memory) -> (B, T, D): a slow, obvious form of a variant, correct at real positions."""

HEADS = (
    "A frequent cause: view(B, T, H, E) followed by a matmul without transpose(1, 2). The scores of attention are "
    "(B, H, T, T), position by position; without the transpose they are (B, T, H, H), head by head."
)
ROLES: tuple[Role, ...] = ("causal", "bidirectional", "cross")


@dataclass(frozen=True)
class Subject:
    """An attention variant under test.

    Attributes:
        factory: builds it from (dim, role).
        dim: the width it is built with.
        seed: of weights and inputs.
        reference: a slow form of it, or None.
        compile_backend: of torch.compile; None skips that property.
    """

    factory: Callable[..., Attention]
    dim: int
    seed: int = 0
    reference: Reference | None = None
    compile_backend: str | None = "inductor"

    @property
    def declared(self) -> frozenset[Any]:
        """The roles that the class declares."""
        target: Any = getattr(self.factory, "func", self.factory)
        found: frozenset[Any] = target.roles
        return found

    @property
    def roles(self) -> list[Role]:
        """The roles that it can be built as, the causal one first."""
        return [role for role in ROLES if role in self.declared]

    @property
    def usages(self) -> list[RoleUsage]:
        """One for each role. Raises Violation for a role that does not exist."""
        wrong = [role for role in self.declared if role not in ROLES]
        if wrong or not self.roles:
            raise Violation(f"roles is {wrong or 'empty'}; allowed: {', '.join(ROLES)}")
        return [RoleUsage(self, role) for role in self.roles]

    def build(self, role: Role, dtype: torch.dtype = torch.float64, seed: int = 0, **arguments: Any) -> Attention:
        """Return a module in eval mode with noise on all weights; another ``seed`` gives other weights."""
        with seeded(self.seed + seed):
            module = self.factory(self.dim, role, **arguments)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    # Weights that start at zero or one hide what they do: an output matrix of zeros hides every bug.
                    width = parameter.shape[-1] if parameter.dim() > 1 else 4
                    parameter.add_(0.4 * torch.randn(parameter.shape) / width**0.5)
        return module.to(dtype).eval()

    def x(self, batch: int, length: int, number: int = 0) -> Tensor:
        """Return inputs (batch, length, dim) in double precision; another ``number`` gives others."""
        return normal(batch, length, self.dim, seed=1000 * self.seed + number)


@dataclass(frozen=True)
class RoleUsage(Usage[Columns]):
    """An attention variant in one role."""

    subject: Subject
    role: Role

    @property
    def label(self) -> str:  # type: ignore[override]
        """The role."""
        return f"role {self.role}"

    def raw(self) -> Attention:
        """Return a module as the framework builds it."""
        return self.subject.factory(self.subject.dim, self.role)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Attention:
        """Return a module in eval mode with noise on all weights."""
        return self.subject.build(self.role, dtype, seed)

    def attributes(self) -> dict[str, Any]:
        """Return its width and role."""
        return {"dim": self.subject.dim, "role": self.role}

    def inputs(self, batch: int, length: int, number: int = 0) -> Columns:
        """Return a dense sequence; a memory is one column shorter."""
        memory = dense_memory(self.subject, self.role, batch, length)
        return Columns(self.subject.x(batch, length, number), Sequence.dense(length), memory)

    def kinds(self) -> list[Columns]:
        """Return dense, and padded and packed inputs, one row of which is nothing but padding."""
        segments, batch = [[1, 1, 1, 2, 2, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], 3
        x, dense, padded = self.subject.x(batch, 6), self.inputs(1, 6), sequence(segments)
        if self.role == "cross":
            return [Columns(x, Sequence.dense(6), Memory(self.subject.x(batch, 6, 7), padded)), dense]
        return [Columns(x, padded), dense]

    def outputs(self, module: Any, inputs: Columns) -> dict[str, Tensor]:
        """Return what ``forward`` computes."""
        seq, memory = dataclasses.replace(inputs.seq, memo={}), inputs.memory
        return {"forward": run(module, inputs.x_BTD, seq, memory)}

    def hint(self, module: Any) -> str:
        """Explain a variant that runs at one single length: it takes the heads for positions."""
        runs = []
        for length in range(2, 17):
            try:
                self.outputs(module, self.inputs(1, length))
                runs.append(length)
            except Exception:
                continue
        return f". Of the lengths 2 to 16 only {runs[0]} runs, its number of heads? {HEADS}" if len(runs) == 1 else ""


def subject(
    factory: functools.partial[Any],
    *,
    dim: int | None = None,
    seed: int = 0,
    reference: Reference | None = None,
    compile_backend: str | None = "inductor",
) -> Subject:
    """Return the subject; without ``dim`` it has the first usual width that the variant can be built with."""
    return first_that_builds(lambda width: Subject(factory, width, seed, reference, compile_backend), dim)


def memory_of(subject: Subject, segments: Segments | None, batch: int, length: int) -> Memory:
    """Return an encoder's output with these segments."""
    x = subject.x(batch, length, 7)
    return Memory(x, sequence(segments, length=length))


def dense_memory(subject: Subject, role: Role, batch: int, length: int) -> Memory | None:
    """Return the memory that a role reads next to dense input: one column shorter, or None."""
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
