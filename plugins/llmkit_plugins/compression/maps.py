"""What methods share that change the linear maps of a model: which these are, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration, Compression, Matrix, matrices, watching
from llmkit.errors import UserError
from llmkit_plugins.attention.recurrent import Recurrent

T = TypeVar("T")


def maps(model: nn.Module) -> list[Matrix]:
    """Return the matrices of linear maps and of recurrences; tables that rows are looked up in stay as they are.

    Raises UserError when there are none: a method before has packed them.
    """
    kinds = (nn.Linear, nn.RNNBase)
    found = [one for one in matrices(model) if all(isinstance(module, kinds) for module, _ in one.places)]
    if not found:
        raise UserError("there is no linear map left to compress: a method before it has packed them all")
    return found


def second_moments(model: nn.Module, rows: Calibration) -> dict[str, Tensor]:
    """Return the mean of x x^T over what each linear map reads, (columns, columns), by the name of its weight.

    The matrices of a recurrence read its inputs, and its outputs of the step before: the last outputs of a text, which
    none reads, are counted too. A weight that is read without calling its module is not in it: an embedding that is the
    output matrix, say.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x_ND: Tensor) -> None:
        exact_ND = x_ND.double()
        product = exact_ND.T @ exact_ND
        sums[name] = sums[name] + product if name in sums else product
        counts[name] = counts.get(name, 0) + len(x_ND)

    def hook(path: str) -> Callable[[Recurrent, tuple[Any, ...], Tensor], None]:
        def recurrence(module: Recurrent, inputs: tuple[Any, ...], y_BTD: Tensor) -> None:
            ends = ("_l0", "_l0_reverse")[: 1 + module.rnn.bidirectional]
            for end, states_BTW in zip(ends, y_BTD.detach().chunk(len(ends), -1), strict=True):
                see(f"{path}.rnn.weight_ih{end}", inputs[0].detach().flatten(0, -2))
                see(f"{path}.rnn.weight_hh{end}", states_BTW.flatten(0, -2))

        return recurrence

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Recurrent)]
    hooks = [module.register_forward_hook(hook(path)) for path, module in found]
    try:
        with watching(model, see):
            rows.loss()
    finally:
        for one in hooks:
            one.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def percent(text: str, what: str) -> float:
    """Return the share that ``50`` stands for, above 0 and below 1. Raises UserError for another text."""
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"takes {what} above 0 and below 100, as in 50, got '{text}'")
    return share


def of_model(given: dict[str, T], found: dict[str, object]) -> dict[str, T]:
    """Return what a checkpoint says about parts of a model, once all of them are there. Raises UserError."""
    missing = [name for name in given if name not in found]
    if missing:
        raise UserError(f"it names {missing[0]}, which this model does not have")
    return given


def positive(value: object) -> int:
    """Return a number of rows from a checkpoint. Raises UserError unless it is a whole number above 0."""
    if type(value) is not int or value < 1:
        raise UserError(f"it has the number {value!r}, which should be at least 1")
    return value


def keep(module: nn.Linear, rows: Tensor | slice, columns: Tensor | slice) -> None:
    """Remove all rows (outputs) and columns (inputs) of a linear map but some."""
    module.weight = nn.Parameter(module.weight.detach()[rows][:, columns].clone())
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[rows].clone())
    module.out_features, module.in_features = module.weight.shape


def is_plain(module: object) -> bool:
    """Return whether a module is a linear map whose weight has its usual form."""
    return isinstance(module, nn.Linear) and "weight" in module._parameters


class Removal(Compression):
    """A share of the parts of each module is removed for good, those that matter least on rows of the training data.

    Args:
        share: share of the parts that is removed.
    """

    trains: ClassVar[bool] = True
    expands: ClassVar[bool] = False
    reads: ClassVar[bool] = True
    parts: ClassVar[str]

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise UserError(f"share must be above 0 and below 1, got {share}")
        self.share = share

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return the percentage of parts that stands after the name."""
        return {"share": percent(text, f"the percentage of {cls.parts} to remove")}


def fewest(scores: Tensor, share: float) -> Tensor:
    """Return which entries are kept, in order, when a share of them, those of the lowest score, is removed.

    At least one is kept.
    """
    removed = min(round(share * len(scores)), len(scores) - 1)
    return torch.argsort(scores, stable=True)[removed:].sort().values
