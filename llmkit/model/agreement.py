"""What the parts of a network need of each other: an attention the topology's roles, a position bias the heads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkit.contracts import Attention, Position, Role, Topology
from llmkit.errors import Problem, UserError, blame
from llmkit.registry import target_of
from llmkit.sequence import Sequence


def check_role(topology: Topology, name: str, factory: Callable[..., Attention], role: Role) -> None:
    """Raise UserError when a variant cannot be built as the topology needs it."""
    variant = target_of(factory)
    roles: frozenset[Role] = getattr(variant, "roles", frozenset())
    if role not in roles:
        text = (
            f"{getattr(variant, '__name__', variant)} cannot be built as '{role}', which the head's topology "
            f"'{topology}' needs. It supports: {', '.join(sorted(roles)) or '(nothing)'}."
        )
        raise UserError(Problem(f"model.{name}", text))


def check_sides(topology: Topology, **given: int | None) -> None:
    """Raise UserError when a network with one stack is given what makes the sides of an encoder-decoder differ."""
    for name, value in given.items():
        if value and topology != "encoder_decoder":
            text = f"needs a head whose network has an encoder and a decoder, and this one has one {topology}"
            raise UserError(Problem(f"model.{name}", text))


class _Asked(Position):
    """Adds nothing; remembers for how many heads a bias was asked."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.heads: set[int] = set()

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return None."""
        self.heads.add(num_heads)
        return None


def position_arguments(
    position: Callable[..., Position], attention: Callable[..., Attention], dim: int, role: Role, layers: int
) -> dict[str, Any]:
    """Return the arguments that a position encoding takes from the network: ``role`` and ``bias_heads``.

    Args:
        position: builds the position encoding.
        attention: builds the attention of a layer.
        dim: width of the network.
        role: the role of the stack's attention.
        layers: the stack's number of layers.

    Raises UserError when layers have different numbers of heads.
    """
    takes = inspect.signature(target_of(position)).parameters
    found: dict[str, Any] = {"role": role} if "role" in takes else {}
    return found | ({"bias_heads": biased_heads(attention, dim, role, layers)} if "bias_heads" in takes else {})


def biased_heads(attention: Callable[..., Attention], dim: int, role: Role, layers: int) -> int:
    """Return how many heads have a position bias of their own; 0: the attention has none.

    Raises UserError when layers have different numbers.
    """
    by_layer = "layer" in inspect.signature(target_of(attention)).parameters
    asked = _Asked()
    for index in range(layers if by_layer else 1):
        build = functools.partial(attention, layer=index) if by_layer else attention
        try:
            _ask(build, dim, role, asked, "meta")
        except NotImplementedError:  # an operation that needs memory
            _ask(build, dim, role, asked, "cpu")
    if len(asked.heads) > 1:
        numbers = " and ".join(map(str, sorted(asked.heads)))
        raise UserError(
            Problem("model.position", f"needs layers with the same number of heads, and they have {numbers}")
        )
    return max(asked.heads, default=0)


@torch.no_grad()
def _ask(build: Callable[..., Attention], dim: int, role: Role, asked: _Asked, device: str) -> None:
    with torch.device(device), torch.random.fork_rng(devices=[]):
        with blame("model.attention"):
            layer = build(dim, role).eval()
        seq = Sequence.dense(2, device)
        seq.position = asked
        layer(torch.zeros(1, 2, dim, device=device), seq)
