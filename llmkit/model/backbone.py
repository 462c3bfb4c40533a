"""The network: embeddings, positions, layers of attention and feedforward, final norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkit.contracts import Attention, Feedforward, Network, Norm, Position, Role, Topology
from llmkit.errors import Problem, UserError
from llmkit.ops.elementwise import Dropout
from llmkit.registry import target_of
from llmkit.sequence import Memory, Sequence, State

ROLES: dict[Topology, tuple[Role, ...]] = {
    "decoder": ("causal",),
    "encoder": ("bidirectional",),
    "encoder_decoder": ("bidirectional", "causal"),
}


def check_roles(topology: Topology, attention: Callable[..., Attention], cross: Callable[..., Attention]) -> None:
    """Raise UserError when a variant cannot be built as the topology needs it."""
    needed = [("model.attention", attention, role) for role in ROLES[topology]]
    if topology == "encoder_decoder":
        needed.append(("model.cross_attention", cross, "cross"))
    for key, factory, role in needed:
        variant = target_of(factory)
        roles: frozenset[Role] = getattr(variant, "roles", frozenset())
        if role not in roles:
            text = (
                f"{getattr(variant, '__name__', variant)} cannot be built as '{role}', which the head's topology "
                f"'{topology}' needs. It supports: {', '.join(sorted(roles)) or '(nothing)'}."
            )
            raise UserError(Problem(key, text))


def can_cross(attention: Callable[..., Attention]) -> bool:
    """Return whether the variant can serve as cross-attention."""
    return "cross" in getattr(target_of(attention), "roles", ())


class Layer(nn.Module):
    """Attention, cross-attention if there is a memory to read, and feedforward, each with norm and residual."""

    def __init__(
        self,
        dim: int,
        attention: Attention,
        cross: Attention | None,
        feedforward: Feedforward,
        norm: Callable[[int], Norm],
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(dim)
        self.attention = attention
        self.cross_norm = norm(dim) if cross is not None else None
        self.cross = cross
        self.feedforward_norm = norm(dim)
        self.feedforward = feedforward
        self.dropout = Dropout(dropout) if dropout else nn.Identity()
        self.norm_first = norm_first

    def forward(
        self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None, cross_state: State | None
    ) -> Tensor:
        """Return the layer's output, (B, T, D)."""
        x_BTD = self._residual(x_BTD, self.attention_norm, lambda x: self.attention(x, seq, state=state))
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            x_BTD = self._residual(x_BTD, self.cross_norm, lambda x: cross(x, seq, memory=memory, state=cross_state))
        return self._residual(x_BTD, self.feedforward_norm, self.feedforward)

    def _residual(self, x: Tensor, norm: Norm, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            added: Tensor = x + self.dropout(part(norm(x)))
            return added
        normalised: Tensor = norm(x + self.dropout(part(x)))
        return normalised


class Backbone(nn.Module, Network):
    """A language network of any topology, put together from plugins.

    Args:
        vocab_size: number of token ids.
        dim: width.
        num_layers: layers; in an encoder-decoder, of each side.
        topology: ``decoder``, ``encoder`` or ``encoder_decoder``.
        max_length: most positions of one sequence.
        attention: builds the variant of a layer from ``(dim, role)``.
        cross_attention: builds the cross-attention of a decoder layer in the same way.
        position: builds the position encoding from ``(dim, max_length)``.
        feedforward: builds the feedforward from ``dim``.
        norm: builds a norm from ``dim``.
        dropout: dropout on the embeddings and on each residual branch.
        norm_first: norm before each part (pre-norm) rather than after the residual.
        tie_embeddings: use the embedding matrix as the output matrix (Press and Wolf 2017, arXiv:1608.05859).
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        topology: Topology,
        max_length: int,
        attention: Callable[[int, Role], Attention],
        cross_attention: Callable[[int, Role], Attention],
        position: Callable[[int, int], Position],
        feedforward: Callable[[int], Feedforward],
        norm: Callable[[int], Norm],
        dropout: float = 0.0,
        norm_first: bool = True,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        check_roles(topology, attention, cross_attention)
        self.topology = topology
        self._max_length = max_length

        def stack(role: Role, with_cross: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Layer(
                    dim,
                    attention(dim, role),
                    cross_attention(dim, "cross") if with_cross else None,
                    feedforward(dim),
                    norm,
                    dropout,
                    norm_first,
                )
                for _ in range(num_layers)
            )

        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = position(dim, max_length)
        self.dropout = Dropout(dropout) if dropout else nn.Identity()
        two_sided = topology == "encoder_decoder"
        # A post-norm stack ends in a norm already.
        final = norm if norm_first else lambda _: nn.Identity()
        if topology != "decoder":
            self.encoder, self.encoder_norm = stack("bidirectional", False), final(dim)
        if topology != "encoder":
            self.decoder, self.decoder_norm = stack("causal", two_sided), final(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False) if not tie_embeddings and topology != "encoder" else None
        self._initialise(num_layers * (3 if two_sided else 2))

    def _initialise(self, residual_parts: int) -> None:
        """Set N(0, 0.02), with residual outputs scaled down by their number (GPT-2: Radford et al. 2019)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.rpartition(".")[2] == "out"
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(residual_parts) if residual else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into scores over the vocabulary."""
        return self.embedding.weight if self.output is None else self.output.weight

    @property
    def max_length(self) -> int:
        """The context: the most positions of one sequence."""
        return self._max_length

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        """Run the bidirectional encoder; returns its hidden states with the sequence."""
        if self._runs_compiled:
            return Memory(self("encode", ids_BT, _tensors(seq)), seq)
        return Memory(self._encode(ids_BT, seq), seq)

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        """Run the causal decoder and return its hidden states, (B, T, D)."""
        if not self._runs_compiled or state is not None:
            return self._decode(ids_BT, seq, memory, state)
        read = None if memory is None else (memory.x_BSD, *_tensors(memory.seq))
        hidden: Tensor = self("decode", ids_BT, _tensors(seq), read)
        return hidden

    @property
    def _runs_compiled(self) -> bool:
        """Whether ``compile`` was called and this is training: other passes have too many shapes of their own."""
        return self._compiled_call_impl is not None and torch.is_grad_enabled()

    def forward(
        self,
        part: Literal["encode", "decode"],
        ids_BT: Tensor,
        where: tuple[Tensor, Tensor | None],
        read: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """Return the hidden states of ``encode`` or ``decode``: what ``compile`` has compiled, for training.

        Only tensors go in: torch.compile would guard other objects again in every step.

        Args:
            part: which of the two.
            ids_BT: token ids.
            where: positions and segments of the ids.
            read: the memory to read, with its positions and segments.
        """
        if part == "encode":
            return self._encode(ids_BT, Sequence(*where))
        memory = None if read is None else Memory(read[0], Sequence(*read[1:], self.position))
        return self._decode(ids_BT, Sequence(*where), memory, None)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have training passes compiled by ``torch.compile``, which gets the arguments."""
        # Without the hooks around ``forward``: FSDP has the same ones around ``encode`` and ``decode``.
        self._compiled_call_impl = torch.compile(self.forward, *args, **kwargs)

    def _encode(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        x_BTD = self._embed(ids_BT, seq)
        for layer in self.encoder:
            x_BTD = layer(x_BTD, seq, None, None, None)
        hidden: Tensor = self.encoder_norm(x_BTD)
        return hidden

    def _decode(self, ids_BT: Tensor, seq: Sequence, memory: Memory | None, state: list[State] | None) -> Tensor:
        x_BTD = self._embed(ids_BT, seq)
        for index, layer in enumerate(self.decoder):
            own, cross = (state[2 * index], state[2 * index + 1]) if state is not None else (None, None)
            x_BTD = layer(x_BTD, seq, memory, own, cross)
        hidden: Tensor = self.decoder_norm(x_BTD)
        return hidden

    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        """Return two empty states a decoder layer (own, cross), or None when a variant keeps none."""
        states: list[State] = []
        for layer in self.decoder:
            assert isinstance(layer, Layer)
            for part in (layer.attention, layer.cross):
                state = State() if part is None else part.init_state(batch_size, max_length, self.embedding.weight)
                if state is None:
                    return None
                states.append(state)
        return states

    def _embed(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        seq.position = self.position
        embedded: Tensor = self.dropout(self.position.add(self.embedding(ids_BT), seq.positions_BT))
        return embedded

    def flops_per_position(self, length: int) -> float:
        """Return forward FLOPs a position at this length: two a weight of every matrix, and each variant's mixing.

        The embedding table is looked up, not multiplied; tied or not, the output matrix counts once. In an
        encoder-decoder the number is for one source position plus one target position.
        """
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() >= 2 and not _is_embedding(name))
        flops = 2.0 * weights + sum(m.mixing_flops(length) for m in self.modules() if isinstance(m, Attention))
        if self.topology != "encoder" and self.output is None:
            flops += 2.0 * self.embedding.weight.numel()
        return flops

    def num_parameters(self) -> dict[str, int]:
        """Return the number of parameters: ``embedding`` (token and position tables), ``non_embedding``, ``total``."""
        total = sum(p.numel() for p in self.parameters())
        embedding = sum(p.numel() for name, p in self.named_parameters() if _is_embedding(name))
        return {"embedding": embedding, "non_embedding": total - embedding, "total": total}


def _tensors(seq: Sequence) -> tuple[Tensor, Tensor | None]:
    return seq.positions_BT, seq.segments_BT


def _is_embedding(name: str) -> bool:
    return name.startswith(("embedding.", "position."))


def parameter_kinds(net: nn.Module) -> dict[str, str]:
    """Return the kind of each parameter by name: ``matrix``, ``embedding`` (output matrix too) or ``vector``."""

    def kind(name: str, parameter: Tensor) -> str:
        if parameter.dim() < 2:
            return "vector"
        return "embedding" if _is_embedding(name) or name.startswith("output.") else "matrix"

    return {name: kind(name.removeprefix("net."), parameter) for name, parameter in net.named_parameters()}


def parameter_groups(net: nn.Module, kinds: dict[str, str]) -> list[dict[str, Any]]:
    """Return optimizer groups by ``kind``: matrices and embeddings with weight decay, vectors without.

    Args:
        net: the module, possibly wrapped by FSDP since ``kinds`` was taken (its shards are flat).
        kinds: what ``parameter_kinds`` returned.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": []}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name.replace("_fsdp_wrapped_module.", "")]].append(parameter)
    found: list[dict[str, Any]] = [{"params": groups[k], "kind": k} for k in groups if groups[k]]
    return [{**group, "weight_decay": 0.0} if group["kind"] == "vector" else group for group in found]
