"""Different attention in different layers."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, ClassVar

from torch import Tensor

from llmkit import registry
from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Mixing, Sequence, State


class Pattern(Attention):
    """A variant for each layer, by a pattern that repeats: ``[sliding_window, sliding_window, multi_head]``, say.

    Such hybrids look at everything in a few layers only, which makes long texts cheaper: Gemma Team 2024,
    arXiv:2408.00118; with recurrent layers De et al. 2024, arXiv:2402.19427.

    Args:
        dim: model width.
        role: ``causal`` or ``bidirectional``.
        variants: the variants, each by its name or as ``{name: ..., arguments}``; the first layer has the first one.
        layer: the number of this layer, from 0.

    Raises:
        UserError: an empty pattern, or a variant that is not registered, takes other arguments or cannot be built.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(
        self, dim: int, role: Role, variants: Items[Any] = ("sliding_window", "multi_head"), layer: int = 0
    ) -> None:
        super().__init__(dim, role)
        if isinstance(variants, str) or not variants:
            raise UserError(f"variants should be a list of at least one variant, got {variants!r}")
        factories = []
        for variant in variants:
            name = variant.get("name") if isinstance(variant, dict) else variant
            # A name alone, for a class path in a checkpoint could be anything that can be imported.
            if not isinstance(name, str) or "." in name:
                raise UserError(
                    f"variants: expected the name of a variant, or {{name: ..., arguments}}, got {variant!r}"
                )
            factories.append(registry.resolve("attention", variant))
            roles = registry.target_of(factories[-1]).roles
            if role not in roles:
                raise UserError(f"variants: {name} cannot be built as '{role}', only as {', '.join(sorted(roles))}")
        self.variant: Attention = factories[layer % len(factories)](dim, role)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return what the layer's variant makes of the sequence, (B, T, D)."""
        mixed_BTD: Tensor = self.variant(x_BTD, seq, memory=memory, state=state)
        return mixed_BTD

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the map of the layer's variant."""
        return self.variant.mixing(x_BTD, seq, memory=memory)

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return the empty state of the layer's variant."""
        return self.variant.init_state(batch_size, max_length, like)
