"""Any torch module in the place of an attention variant, for the properties that it can have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence, State

PROPERTIES = (
    *("builds", "weights_are_set", "shape", "mixes_positions", "causal_by_gradient", "causal_by_value", "batch_rows"),
    *(
        "gradients",
        "every_parameter_learns",
        "deterministic",
        "bfloat16",
        "state_dict",
        "layout_of_inputs",
        "meta_device",
    ),
    *("compiles", "growth"),
)
"""The properties of a module that knows of neither padding nor documents."""


def adapt(cls: type[nn.Module], arguments: Mapping[str, Any]) -> functools.partial[Any]:
    """Return a plain module as an attention variant: its first argument is the width, ``forward(x)`` takes (B, T, D).

    Its role is ``causal`` when no output depends on a later input but some on an earlier one, else ``bidirectional``.

    Args:
        cls: the module; ``forward`` takes one tensor, or query, key and value.
        arguments: of its constructor; one without default whose name contains "head" is 4.

    Raises:
        UserError: an argument without default is not given, or ``forward`` takes something else.
    """
    given, width = dict(arguments), ""
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        if not width:
            width = name
            if name in given:
                raise UserError(f"{cls.__name__}: {name} is the width: set it by --dim")
        elif name not in given and "head" in name:
            given[name] = 4
        elif name not in given:
            raise UserError(f"{cls.__name__} needs the argument {name}: --init.{name} VALUE")
    kinds = inspect.signature(cls.forward).parameters.values()
    open_ones = [p for p in list(kinds)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(open_ones) not in (1, 3):
        names = ", ".join(p.name for p in open_ones) or "nothing"
        raise UserError(f"{cls.__name__}.forward takes {names}; expected one tensor, or query, key and value")

    class Plain(Attention):
        """The module in the place of an attention variant."""

        roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

        def __init__(self, dim: int, role: Role) -> None:
            super().__init__(dim, role)
            self.module = cls(**({width: dim} if width else {}), **given)

        def forward(
            self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
        ) -> Tensor:
            """Return the module's output, the first one if there are several."""
            y: Any = self.module(*[x_BTD] * len(open_ones))
            found: Tensor = y[0] if isinstance(y, tuple) else y
            return found

    Plain.roles = frozenset({_role(Plain)})
    Plain.__module__, Plain.__qualname__ = cls.__module__, cls.__qualname__
    found: functools.partial[Any] = functools.partial(Plain)
    return found


def _role(cls: Any) -> Role:
    """Return the role that a module plays, by gradient."""
    try:
        module, x = cls(16, "causal").double().eval(), torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
        y = module(x, Sequence.dense(4))
        (first,) = torch.autograd.grad(y[:, 0].sum(), x, retain_graph=True)
        (last,) = torch.autograd.grad(y[:, -1].square().sum(), x)
    except Exception:  # the first properties report it
        return "bidirectional"
    return "causal" if last[:, :-1].any() and not first[:, 1:].any() else "bidirectional"
