"""What an architecture of Hugging Face is in our parts: the settings, the weights, and the heads that come with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from llmkit.hf.folder import Config
from llmkit.hf.mapping import Weight

Settings = dict[str, Any]
"""Keys below ``model``."""

ACTIVATIONS: dict[str, Settings] = {
    "gelu": {"name": "gelu"},
    "gelu_new": {"name": "gelu", "approximate": "tanh"},
    "gelu_pytorch_tanh": {"name": "gelu", "approximate": "tanh"},
    "relu": {"name": "relu"},
    "silu": {"name": "silu"},
    "swish": {"name": "silu"},
    "relu2": {"name": "squared_relu"},
}
"""Their activation functions, and the feedforward of ours that has each."""


def classes(head: str, labels: list[str]) -> Settings:
    """Return what a config.json says of the outputs of a classifier.

    Args:
        head: the head's name.
        labels: the names of its labels; for other heads none.
    """
    kinds = {"multi_label": "multi_label_classification", "regression": "regression"}
    labels = ["score"] if head == "regression" else labels
    numbers = {label: number for number, label in enumerate(labels)}
    names = {"id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers}
    return (names if labels else {}) | ({"problem_type": kinds[head]} if head in kinds else {})


@dataclass(frozen=True)
class Task:
    """The head that a model was published with."""

    head: Settings
    """Its name and arguments."""
    settings: Settings = field(default_factory=dict)
    """What the head needs of the network."""
    weights: tuple[Weight, ...] = ()
    """Its weights; ours begin with ``head.`` or ``net.``."""
    info: Settings = field(default_factory=dict)
    """What the head learned before: the names of its labels."""
    others: tuple[Settings, ...] = ()
    """Further heads that the same network and weights are right for."""


class Architecture(ABC):
    """One architecture. Names of theirs are those without the prefix that models with a head put before them."""

    prefix: ClassVar[str]
    """What stands before the names of the network's weights in a model with a head."""
    unused: ClassVar[str] = r"(?!)"
    """A regular expression of names that hold no weights: masks and positions."""
    outside: ClassVar[frozenset[str]] = frozenset({"lm_head.weight"})
    """Weights of the network that have no such prefix."""
    copies: ClassVar[dict[str, str]] = {}
    """Weights that are another weight once more; ``lm_head.weight`` only where embeddings are tied."""
    of_heads: ClassVar[str] = r"(?!)"
    """A regular expression of names that belong to heads, and are left out where another head is asked for."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def settings(self) -> Settings:
        """Return the settings of the network. Raises UserError for what our parts cannot be."""

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Yield the weights of the network."""

    @abstractmethod
    def tasks(self) -> dict[str, Task]:
        """Return the heads that this architecture is published with, by the name of their class."""

    def complete(self, weights: dict[str, Tensor]) -> None:  # noqa: B027 (most have nothing to add)
        """Add weights that a folder may leave out, by their names without the prefix."""

    def task(self) -> Task | None:
        """Return the head that this model was published with, or None."""
        names = self.config.get("architectures")
        known = self.tasks()
        names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return next((known[name] for name in names if name in known), None)

    def feedforward(self, activation: str, hidden: int, bias: bool, gated: bool = False) -> Settings:
        """Return the settings of a feedforward. Raises UserError for an unknown activation."""
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.config.refuse(f"with the activation {activation!r:.60} is not supported; these are: {known}")
        found = {**ACTIVATIONS[activation], "hidden": hidden, "bias": bias}
        if gated:
            found = {**found, "name": "swiglu"} if found["name"] == "silu" else {**found, "gated": True}
        return found
