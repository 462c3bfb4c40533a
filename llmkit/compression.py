"""All that the author of a compression method reads: what a method does, and how a matrix is kept in another form.

A method changes a trained model in place. What it has decided (the rank of each matrix, the channels that are left) is
plain data that goes into the checkpoint; from it the same structure is built again, empty, when the file is loaded.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """Rows of the training data that a method may run the model on, in evaluation mode and without gradients."""

    loss: Callable[[], float]
    """Runs the model on all rows and returns its mean loss."""
    rows: int
    """How many there are."""


class Compression(ABC):
    """One way to make a trained model smaller or faster, built from plain arguments.

    The model comes as ``nn.ModuleDict({"net": network, "head": head})``: names begin with ``net.`` or ``head.``.
    """

    trains: ClassVar[bool] = False
    """Whether a compressed model can be trained further, as ``model.init_from`` of a fit."""
    expands: ClassVar[bool] = True
    """Whether ``expand`` gives back a model of the original structure, for exports."""
    reads: ClassVar[bool] = False
    """Whether it needs rows of the data."""

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return the arguments that stand after a method's name: ``50`` of ``svd50``; empty for the name alone.

        Raises UserError for any other text.
        """
        if text:
            raise UserError("takes nothing after its name")
        return {}

    @abstractmethod
    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Compress a model in place; return what has been decided, as JSON-able data for ``rebuild``.

        Args:
            model: the trained model; another method may have compressed it before.
            rows: what to calibrate with; given exactly when the method ``reads``.

        Raises UserError when there is nothing to compress.
        """

    @abstractmethod
    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Give an untrained model the structure that ``apply`` gave the trained one; its values are loaded later.

        Both the modules' names in the state and the shapes have to be the same. It also runs on the meta device, where
        a file is compared before memory is taken; ``made`` may be anything in a damaged one, so that anything may be
        raised over it.
        """


class Packed(nn.Module, ABC):
    """A matrix (rows, columns) in another form: parameters or buffers, and ``forward``, which makes the matrix."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the matrix."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ matrix.T + bias`` for (..., columns); a form that is faster without its matrix overrides it."""
        return F.linear(x, self(), bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return rows of the matrix by number, (..., columns)."""
        return F.embedding(ids, self())


@dataclass(frozen=True)
class Matrix:
    """A matrix among the parameters of a model."""

    name: str
    """``net.decoder.0.attention.out.weight``; of one that several modules share, the first one's."""
    weight: nn.Parameter
    places: list[tuple[nn.Module, str]]
    """The modules that have it, and its name there."""

    def replace(self, packed: Packed) -> None:
        """Put another form in its place: the modules' code reads the matrix under its name as before."""
        for module, name in self.places:
            pack(module, name, packed)


def matrices(model: nn.Module) -> list[Matrix]:
    """Return the matrices of a model: of linear maps, embeddings, recurrences, and any other parameter with two sides.

    Raises UserError when there are none: all have been packed before.
    """
    found: dict[int, Matrix] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 2 and min(weight.shape) > 1 and weight.is_floating_point():
                one = found.setdefault(id(weight), Matrix(f"{path}.{name}", weight, []))
                one.places.append((module, name))
    if not found:
        raise UserError("there is no matrix left to compress: a method before it has packed them all")
    return [*found.values()]


def pack(module: nn.Module, name: str, packed: Packed) -> None:
    """Put another form in the place of a module's parameter: ``packed_NAME`` in its state, NAME to its code."""
    del module._parameters[name]
    module.add_module(f"packed_{name}", packed)
    module.__class__ = _with_packed(type(module), name)  # type: ignore[arg-type]


@functools.cache
def _with_packed(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """Return a class whose instances make an attribute of what ``pack`` put in its place."""
    inside = f"packed_{name}"
    members: dict[str, Any] = {
        name: property(lambda self: getattr(self, inside)()),
        "unpacked_class": getattr(cls, "unpacked_class", cls),
    }
    if name == "weight" and cls.forward is nn.Linear.forward:
        members["forward"] = lambda self, input: self.packed_weight.linear(input, self.bias)
    elif name == "weight" and cls.forward is nn.Embedding.forward:
        members["forward"] = lambda self, input: self.packed_weight.lookup(input)
    elif issubclass(cls, nn.RNNBase):  # which keeps a list of its weights

        def ignore(self: Any, value: Any) -> None:
            self.__dict__.pop("_flat_weights", None)

        members["_flat_weights"] = property(
            lambda self: [getattr(self, one) for one in self._flat_weights_names], ignore
        )
    return type(cls.__name__, (cls,), members)


def expand(model: nn.Module) -> None:
    """Put plain parameters back in the place of everything packed, with the values that the packed forms stand for."""
    plain: dict[int, nn.Parameter] = {}
    for module in [module for module in model.modules() if hasattr(type(module), "unpacked_class")]:
        names = [name for name, inner in module.named_children() if isinstance(inner, Packed)]
        forms: list[Any] = [getattr(module, name) for name in names]
        for name in names:
            delattr(module, name)
        module.__class__ = type(module).unpacked_class  # type: ignore[attr-defined]
        for name, form in zip(names, forms, strict=True):
            if id(form) not in plain:
                plain[id(form)] = nn.Parameter(form().detach().clone())
            module.register_parameter(name.removeprefix("packed_"), plain[id(form)])
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


class PackingMethod(Compression):
    """A method that packs each matrix by itself. Override ``form``, and ``apply`` where more than values decide."""

    @abstractmethod
    def form(self, weight: Tensor) -> Packed:
        """Return the empty form of a matrix of this shape and device."""

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Pack every matrix; the form's ``take`` gets its values."""
        for matrix in matrices(model):
            packed: Any = self.form(matrix.weight)
            packed.take(matrix.weight.detach())
            matrix.replace(packed)
        return {}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Put empty forms in the place of the matrices."""
        for matrix in matrices(model):
            matrix.replace(self.form(matrix.weight))


@contextmanager
def watching(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand what each linear map reads to ``see``: the name of its weight, and its inputs, (N, columns).

    A map whose weight is read directly, without calling it, is not seen.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: see(name, inputs[0].detach().flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(hook(f"{path}.weight"))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
