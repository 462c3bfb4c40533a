"""Whole layers removed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from llmkit.compression import Calibration, Compression
from llmkit.errors import UserError


class DropLayers(Compression):
    """The layers are removed without which the loss on some rows of the training data rises the least, one by one.

    Each time the loss is measured without each of the layers that are left: it is the effect of a layer, whatever its
    kind. Every stack keeps one. Men et al. 2024 (ShortGPT, arXiv:2403.03853) remove layers by how little they change
    their input instead.

    Args:
        count: how many are removed.
    """

    trains: ClassVar[bool] = True
    expands: ClassVar[bool] = False
    reads: ClassVar[bool] = True

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        self.count = count

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return the number of layers that stands after the name."""
        if not text.isdecimal():
            raise UserError(f"takes the number of layers to remove, as in 1, got '{text}'")
        return {"count": int(text)}

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Remove layers; returns those that are left, by stack."""
        assert rows is not None
        net = model["net"]
        whole = _stacks(net)
        left = {name: list(range(len(stack))) for name, stack in whole.items()}
        most = sum(map(len, left.values())) - len(left)
        if self.count > most:
            raise UserError(f"can remove at most {most} layers of this model, got {self.count}")
        for _ in range(self.count):
            losses: dict[tuple[str, int], float] = {}
            for name, stack in _stacks(net).items():
                for place in range(len(stack)) if len(stack) > 1 else ():
                    setattr(net, name, _without(stack, place))
                    losses[name, place] = rows.loss()
                    setattr(net, name, stack)
            name, place = min(losses, key=losses.__getitem__)
            setattr(net, name, _without(getattr(net, name), place))
            del left[name][place]
        gone = [f"{name} {index}" for name in left for index in range(len(whole[name])) if index not in left[name]]
        return {"layers": left, "note": f"without {', '.join(gone)}"}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Keep the layers that are left."""
        net = model["net"]
        for name, stack in _stacks(net).items():
            left = made["layers"][name]
            if left != [index for index in range(len(stack)) if index in left]:
                raise UserError(f"it has the layers {left} of {len(stack)}")
            setattr(net, name, nn.ModuleList(stack[index] for index in left))


def _stacks(net: nn.Module) -> dict[str, nn.ModuleList]:
    found = {name: getattr(net, name, None) for name in ("encoder", "decoder")}
    return {name: stack for name, stack in found.items() if isinstance(stack, nn.ModuleList)}


def _without(stack: nn.ModuleList, place: int) -> nn.ModuleList:
    return nn.ModuleList(layer for index, layer in enumerate(stack) if index != place)
