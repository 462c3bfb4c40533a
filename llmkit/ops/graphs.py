"""Steps of decoding as CUDA graphs: what a step launches is captured once, and replayed by a single call.

A small model at a few rows spends its time on launches. A graph repeats the same kernels on the same memory, so a step
can be captured if it does nothing else: its tensors stay where they are and keep their shapes, no number of the host
changes from one step to the next, and nothing waits for the device. What is rebound (``state["h"] = new``) is copied
back to its place within the graph; for the rest see ``StaticSteps``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkit.errors import note
from llmkit.sequence import State

ENOUGH = 16
"""Fewest steps worth a capture, which takes as long as a few of them."""

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Takes a step and runs none of its kernels; returns its result and what runs them."""


def cuda_graph(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture a step on the current CUDA device. Raises RuntimeError where it does what a graph cannot."""
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    # Not `torch.cuda.graph`, which empties the allocator's cache; other threads may pin memory meanwhile.
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return result, graph.replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures: with each stream goes a workspace for products, which stays."""
    return torch.cuda.Stream(device)


CAPTURE: dict[str, Capture] = {"cuda": cuda_graph}
"""How a step is captured, by device type."""


def capture_on(device: torch.device) -> Capture | None:
    """Return how a step is captured on a device, or None. Processes that work together may wait for each other."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return None if together else CAPTURE.get(device.type)


class StaticSteps:
    """Steps of one column for all rows. The first is run, the second is captured, that one and later ones are replayed.

    A step that cannot be captured is run each time, and a note says why: a state that grows, keeps something else than
    tensors, or reads its ``length`` for more than whether it is zero; or whatever the device refuses.

    Args:
        run: takes ids, (B, 1), and positions, (B or 1, 1), and returns the scores, (B, V).
        states: the decoding states, after at least one column.
        positions_b1: of the first step; each step adds one to it.
        capture: how a step is captured.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor], Tensor], states: list[State], positions_b1: Tensor, capture: Capture
    ) -> None:
        self.run, self.states, self.positions_b1 = run, states, positions_b1
        self.capture: Capture | None = capture
        self.ids_B1: Tensor | None = None
        self.captured: tuple[Tensor, Callable[[], None]] | None = None
        for state in states:
            state.settle()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Return the scores after one more column, (B, V); the next step overwrites them."""
        if self.ids_B1 is None:  # what is set up at the first call (libraries, memory) cannot be captured
            self.ids_B1 = ids_B1.clone()
            return self._step()
        self.ids_B1.copy_(ids_B1)
        if self.captured is None and self.capture is not None:
            try:
                with torch.cuda.device_of(ids_B1):
                    self.captured = self.capture(self._static_step)
            except Exception as error:  # of a plugin or the device: whatever it is, running is right
                _leave_out(str(error).splitlines()[0] if str(error) else type(error).__name__)
                self.capture = None
        if self.captured is None:
            return self._step()
        scores_BV, replay = self.captured
        replay()
        for state in self.states:
            state.length += 1
        return scores_BV

    def _step(self) -> Tensor:
        assert self.ids_B1 is not None
        scores_BV = self.run(self.ids_B1, self.positions_b1.clone())  # which a state may keep
        self.positions_b1 += 1
        return scores_BV

    def _static_step(self) -> Tensor:
        """Run a step that leaves the states as they are, except for the values of their tensors."""
        before = [(dict(state), dict(vars(state))) for state in self.states]
        for state in self.states:
            state.length = _Length()  # type: ignore[assignment]
        try:
            scores_BV = self._step()
            self._put_back(before)
        finally:
            for state, (tensors, attributes) in zip(self.states, before, strict=True):
                state.clear()
                state.update(tensors)
                vars(state).clear()
                vars(state).update(attributes)
        return scores_BV

    def _put_back(self, before: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Copy what was rebound to where it was before."""
        places: list[Tensor] = []
        values: list[Tensor] = []
        for state, (tensors, attributes) in zip(self.states, before, strict=True):
            rest = {name: value for name, value in vars(state).items() if name != "length"}
            if any(attributes.get(name, attributes) is not value for name, value in rest.items()):
                raise RuntimeError("a decoding state changes more than its tensors")
            if _shapes(state) != _shapes(tensors):
                raise RuntimeError("a decoding state changes the shape of its tensors")
            changed = [name for name in tensors if state[name] is not tensors[name]]
            places += [tensors[name] for name in changed]
            values += [state[name] for name in changed]
        # One entry may have become what another was.
        held = {tensor.untyped_storage().data_ptr() for tensors, _ in before for tensor in tensors.values()}
        values = [value.clone() if value.untyped_storage().data_ptr() in held else value for value in values]
        if places:
            torch._foreach_copy_(places, values)


class _Length:
    """A number of columns above zero that nothing depends on: a graph would keep what it was at the capture."""

    def __add__(self, other: int) -> _Length:
        return self

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return False if other == 0 else self._unknown()

    def _unknown(self, *other: object) -> Any:
        raise RuntimeError("a decoding state reads its length")

    __hash__ = None  # type: ignore[assignment]
    __lt__ = __le__ = __gt__ = __ge__ = __sub__ = __rsub__ = __mul__ = __floordiv__ = __mod__ = __index__ = _unknown


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@functools.cache
def _leave_out(reason: str) -> None:
    note(f"decoding runs without CUDA graphs ({reason}); the result is the same")
