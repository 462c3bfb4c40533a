"""Passes of a network as they happen: what goes into each attention layer, and the states between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from llmkit.contracts import Attention, Network
from llmkit.model.backbone import Backbone, Layer
from llmkit.sequence import Memory, Sequence, State

Stack = Literal["encoder", "decoder"]


@dataclass
class Part:
    """One attention of one pass: ``module(x_BTD, seq, memory=memory)`` was ``y_BTD``."""

    stack: Stack
    layer: int
    kind: Literal["attention", "cross"]
    module: Attention
    x_BTD: Tensor
    seq: Sequence
    memory: Memory | None
    y_BTD: Tensor


@dataclass
class Pass:
    """One full pass of a stack.

    Attributes:
        stack: which one.
        ids_BT: the tokens that were read.
        seq: positions and padding of the tokens.
        parts: the attentions, layer by layer; a decoder that reads a memory has two a layer.
        states: the residual stream before the first layer and after each, (B, T, D) each.
        hidden_BTD: what the head was given: the last state, normalised.
        source: the pass of the encoder whose memory was read, or None.
    """

    stack: Stack
    ids_BT: Tensor
    seq: Sequence
    parts: list[Part] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    hidden_BTD: Tensor = field(init=False)
    source: Pass | None = None


class Recording(Network):
    """Takes the place of a network for a head, and records its full passes; steps of decoding are not recorded.

    Args:
        net: the network, in eval mode.
    """

    def __init__(self, net: Backbone) -> None:
        self.net = net
        self.passes: list[Pass] = []

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        """Run the encoder and record the pass."""
        done = Pass("encoder", ids_BT, seq)
        with _watched(self.net.encoder, done):
            memory = self.net.encode(ids_BT, seq)
        return cast(Memory, self._add(done, memory, memory.x_BSD))

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        """Run the decoder and record the pass, if there is no state."""
        if state is not None:
            return self.net.decode(ids_BT, seq, memory=memory, state=state)
        done = Pass("decoder", ids_BT, seq)
        if memory is not None:
            done.source = next((one for one in reversed(self.passes) if one.hidden_BTD is memory.x_BSD), None)
        with _watched(self.net.decoder, done):
            hidden_BTD = self.net.decode(ids_BT, seq, memory=memory)
        return cast(Tensor, self._add(done, hidden_BTD, hidden_BTD))

    def _add(self, done: Pass, result: Any, hidden_BTD: Tensor) -> Any:
        done.hidden_BTD = hidden_BTD
        self.passes.append(done)
        return result

    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        """Return what the network returns."""
        return self.net.init_state(batch_size, max_length)

    @property
    def output_weight_VD(self) -> Tensor:
        """That of the network."""
        return self.net.output_weight_VD

    @property
    def output_bias_V(self) -> Tensor | None:
        """That of the network."""
        return self.net.output_bias_V

    @property
    def max_length(self) -> int:
        """That of the network."""
        return self.net.max_length


@contextmanager
def _watched(layers: nn.ModuleList, done: Pass) -> Iterator[None]:
    """Record what goes through layers meanwhile. Hooks alone: no plugin sees a difference."""

    def part(number: int, kind: Literal["attention", "cross"]) -> Callable[..., None]:
        def hook(module: Attention, args: tuple[Any, ...], given: dict[str, Any], y_BTD: Tensor) -> None:
            done.parts.append(Part(done.stack, number, kind, module, args[0], args[1], given.get("memory"), y_BTD))

        return hook

    def begins(module: nn.Module, args: tuple[Any, ...]) -> None:
        done.states.append(args[0])

    def ends(module: nn.Module, args: tuple[Any, ...], x_BTD: Tensor) -> None:
        done.states.append(x_BTD)

    handles = [layers[0].register_forward_pre_hook(begins)]
    for number, layer in enumerate(cast(list[Layer], layers)):
        handles.append(layer.register_forward_hook(ends))
        handles.append(layer.attention.register_forward_hook(part(number, "attention"), with_kwargs=True))
        if layer.cross is not None:
            handles.append(layer.cross.register_forward_hook(part(number, "cross"), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
