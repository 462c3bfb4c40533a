"""A stand-in for CUDA graphs on a CPU: operations are recorded with the tensors they had, and done again on these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.ops.graphs import Capture

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}
"""What has to know values on the host: a capture refuses it."""


class Recorder(TorchDispatchMode):
    """Records what a step does. As in a capture, nothing has happened to earlier tensors when it is over."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, list[tuple[Tensor, Any]]]] = []
        self.undo: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
        written = [given.get(one.name) for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
        self.undo += [(value, value.clone()) for value in tree_leaves(written) if isinstance(value, Tensor)]
        result = func(*args, **kwargs)
        held = {value.untyped_storage().data_ptr() for value in inputs}
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        new = [value.untyped_storage().data_ptr() not in held for value in made]
        if written or any(new):
            self.calls.append((func, args, kwargs, [(v, i) for i, v in enumerate(made) if new[i]]))
        return result

    def __call__(self) -> None:
        """Do all of it again: the same memory, and the numbers that were read then."""
        for func, args, kwargs, made in self.calls:
            results = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
            for place, index in made:
                place.copy_(results[index])


class Graphs:
    """Takes the place of ``llmkit.ops.graphs.cuda_graph``, or watches it, and counts."""

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture or record
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Capture a step; see ``Capture``."""
        result, run = self.capture(step)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            run()

        return result, replay


def record(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record a step; its result is NaN before the first replay."""
    recorder = Recorder()
    try:
        with recorder:
            result = step()
    finally:
        for place, value in reversed(recorder.undo):
            place.copy_(value)
    return result.fill_(torch.nan), recorder
