"""The network: embeddings, positions, layers of attention and feedforward, final norm."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.contracts import Attention, Feedforward, Network, Norm, Position, Role, Topology
from llmkit.errors import blame, returned
from llmkit.model.agreement import check_role, check_sides, position_arguments
from llmkit.model.groups import is_embedding
from llmkit.model.initial import Draws, draw_weights, quieten
from llmkit.ops.elementwise import Dropout
from llmkit.registry import target_of
from llmkit.sequence import Memory, Sequence, State

ROLES: dict[Topology, tuple[Role, ...]] = {
    "decoder": ("causal",),
    "encoder": ("bidirectional",),
    "encoder_decoder": ("bidirectional", "causal"),
}


class Layer(nn.Module):
    """Attention, cross-attention if there is a memory to read, and feedforward, each with norm and residual.

    Args:
        make: builds a part from the name of its argument of ``Backbone``, and a role where it has one.
        role: the role of the layer's attention.
        reads_memory: whether there is cross-attention.
        dropout: dropout on each residual branch.
        norm_first: norm before each part rather than after the residual.
    """

    def __init__(
        self, make: Callable[..., Any], role: Role, reads_memory: bool, dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = make("norm"), make("attention", role)
        self.cross_norm = make("norm") if reads_memory else None
        self.cross = make("cross_attention", "cross") if reads_memory else None
        self.feedforward_norm, self.feedforward = make("norm"), make("feedforward")
        self.dropout = Dropout(dropout)
        self.norm_first = norm_first

    def forward(
        self, x_BTD: Tensor, seq: Sequence, memory: Memory | None, state: State | None, cross_state: State | None
    ) -> Tensor:
        """Return the layer's output, (B, T, D)."""
        x_BTD = self._residual(x_BTD, self.attention_norm, self.attention, seq, state=state)
        if self.cross is not None:
            x_BTD = self._residual(x_BTD, self.cross_norm, self.cross, seq, memory=memory, state=cross_state)
        return self._residual(x_BTD, self.feedforward_norm, self.feedforward)

    def _residual(self, x: Tensor, norm: Any, part: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.norm_first:
            y: Tensor = x + self.dropout(_like(x, part, part(_like(x, norm, norm(x)), *args, **kwargs)))
            return y
        return _like(x, norm, norm(x + self.dropout(_like(x, part, part(x, *args, **kwargs)))))


def _like(x_BTD: Tensor, part: nn.Module, y: Any, method: str = "forward") -> Tensor:
    """Return what a part made of ``x_BTD``. Raises UserError unless it has its shape: another one may broadcast."""
    if isinstance(y, Tensor) and y.shape == x_BTD.shape:
        return y
    kinds = {Attention: "attention", Feedforward: "feedforward", Norm: "norm", Position: "position"}
    name = next((name for kind, name in kinds.items() if isinstance(part, kind)), "")
    name = "cross_attention" if getattr(part, "role", "") == "cross" else name
    with blame(f"model.{name}"):
        raise returned(part, method, y, f"a tensor of the input's shape, (B, T, D) = {tuple(x_BTD.shape)}")


class Backbone(nn.Module, Network):
    """A language network of any topology, built from plugins.

    Args:
        vocab_size: number of token ids.
        dim: width.
        num_layers: layers; in an encoder-decoder, of each side unless ``decoder_layers`` says otherwise.
        topology: ``decoder``, ``encoder`` or ``encoder_decoder``.
        max_length: most positions of one sequence.
        attention: builds the variant of a layer from ``(dim, role)``, and ``layer``, its number, if it takes that.
        cross_attention: builds the cross-attention of a decoder layer in the same way.
        position: builds the position encoding from ``(dim, max_length)``, and ``role`` and ``bias_heads`` if it takes
            them; with a role there is one for each side of an encoder-decoder.
        feedforward: builds the feedforward from ``dim``.
        norm: builds a norm from ``dim``.
        dropout: dropout on the embeddings and on each residual branch.
        norm_first: norm before each part (pre-norm) rather than after the residual.
        tie_embeddings: use the embedding matrix as the output matrix (Press and Wolf 2017, arXiv:1608.05859).
        embedding_norm: a norm after the embeddings and positions (Devlin et al. 2018, arXiv:1810.04805).
        token_types: rows of a table of token types added to the embeddings (the same source); 0: no table.
        output_bias: a learned number is added to the score of each id.
        decoder_layers: layers of the decoder of an encoder-decoder; None: ``num_layers``.
        separate_positions: each side of an encoder-decoder has positions of its own, and a norm after them.
        embedding_scale: what the embeddings are multiplied by.
        output_scale: what the last hidden states are multiplied by.
        gradient_checkpointing: in training keep the input of each layer alone, and compute the layer again for its
            gradient (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        topology: Topology,
        max_length: int,
        attention: Callable[..., Attention],
        cross_attention: Callable[[int, Role], Attention],
        position: Callable[[int, int], Position],
        feedforward: Callable[[int], Feedforward],
        norm: Callable[[int], Norm],
        dropout: float = 0.0,
        norm_first: bool = True,
        tie_embeddings: bool = True,
        embedding_norm: bool = False,
        token_types: int = 0,
        output_bias: bool = False,
        decoder_layers: int | None = None,
        separate_positions: bool = False,
        embedding_scale: float = 1.0,
        output_scale: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        draws = Draws()
        self.topology, self._max_length = topology, max_length
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding_scale, self.output_scale = embedding_scale, output_scale
        self.output_multiplier = 1.0  # of the output matrix; llmkit.model.mup sets it
        factories: dict[str, Callable[..., Any]] = {
            **{"attention": attention, "cross_attention": cross_attention, "feedforward": feedforward},
            **{"position": position, "norm": norm},
        }
        two_sided = topology == "encoder_decoder"
        check_sides(topology, decoder_layers=decoder_layers, separate_positions=separate_positions)
        depths = {"bidirectional": num_layers, "causal": (decoder_layers if two_sided else None) or num_layers}
        by_layer = "layer" in inspect.signature(target_of(attention)).parameters
        for role in ROLES[topology]:
            check_role(topology, "attention", attention, role)
        if two_sided:
            check_role(topology, "cross_attention", cross_attention, "cross")

        def make(name: str, *args: Any, where: str = "", **kwargs: Any) -> Any:
            with blame(f"model.{name}"), draws.named(f"{where}{name}"):
                return factories[name](dim, *args, **kwargs)

        def stack(role: Role) -> nn.ModuleList:
            reads_memory = two_sided and role == "causal"
            layers = []
            for index in range(depths[role]):
                factories["attention"] = functools.partial(attention, layer=index) if by_layer else attention
                part = functools.partial(make, where=f"{role} layer {index} ")
                layers.append(Layer(part, role, reads_memory, dropout, norm_first))
            return nn.ModuleList(layers)

        with draws.named("embedding"):
            self.embedding = nn.Embedding(vocab_size, dim)
        sides = [position_arguments(position, attention, dim, role, depths[role]) for role in ROLES[topology]]
        self.position: Position = make("position", max_length, **sides[0])
        apart = two_sided and (separate_positions or "role" in sides[0])
        self.decoder_position: Position | None = (
            make("position", max_length, where="decoder ", **sides[1]) if apart else None
        )
        with draws.named("token types"):
            self.token_types = nn.Embedding(token_types, dim) if token_types else None
        self.embedding_norm: nn.Module | None = make("norm") if embedding_norm else None
        self.decoder_embedding_norm: nn.Module | None = make("norm") if embedding_norm and separate_positions else None
        self.dropout = Dropout(dropout)
        # A post-norm stack ends in a norm already.
        final = make if norm_first else nn.Identity
        if topology != "decoder":
            self.encoder, self.encoder_norm = stack("bidirectional"), final("norm")
        if topology != "encoder":
            self.decoder, self.decoder_norm = stack("causal"), final("norm")
        untied = not tie_embeddings and topology != "encoder"
        with draws.named("output"):
            self.output = nn.Linear(dim, vocab_size, bias=False) if untied else None
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        draw_weights(self, max(depths.values()) * (3 if two_sided else 2), draws)

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into scores over the vocabulary."""
        weight_VD = self.embedding.weight if self.output is None else self.output.weight
        return weight_VD if self.output_multiplier == 1.0 else weight_VD * self.output_multiplier

    @property
    def output_bias_V(self) -> Tensor | None:
        """What is added to these scores; None: nothing."""
        return self.output_bias

    @property
    def max_length(self) -> int:
        """The context: the most positions of one sequence."""
        return self._max_length

    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        """Run the bidirectional encoder; returns its hidden states with the sequence."""
        x_BSD = self("encoder", ids_BT, _tensors(seq)) if self._runs_compiled else self._run("encoder", ids_BT, seq)
        return Memory(x_BSD, seq)

    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        """Run the causal decoder and return its hidden states, (B, T, D)."""
        if not self._runs_compiled or state is not None:
            return self._run("decoder", ids_BT, seq, memory, state)
        read = None if memory is None else (memory.x_BSD, *_tensors(memory.seq))
        hidden: Tensor = self("decoder", ids_BT, _tensors(seq), read)
        return hidden

    def _run(
        self,
        stack: Literal["encoder", "decoder"],
        ids_BT: Tensor,
        seq: Sequence,
        memory: Memory | None = None,
        state: list[State] | None = None,
    ) -> Tensor:
        """Return the hidden states of a stack of layers, (B, T, D)."""
        position, embedding_norm = self._side(stack)
        seq.position = position
        embedded_BTD = self.embedding(ids_BT)
        if self.embedding_scale != 1.0:
            embedded_BTD = embedded_BTD * self.embedding_scale
        added_BTD = position.add(embedded_BTD, seq.positions_BT)
        x_BTD: Tensor = _like(embedded_BTD, position, added_BTD, "add")
        if self.token_types is not None:
            types_BT = torch.zeros_like(ids_BT) if seq.types_BT is None else seq.types_BT
            x_BTD = x_BTD + self.token_types(types_BT.clamp(max=self.token_types.num_embeddings - 1))
        if embedding_norm is not None:
            x_BTD = _like(x_BTD, embedding_norm, embedding_norm(x_BTD))
        x_BTD = self.dropout(x_BTD)
        layers, norm = self._stack(stack)
        for index, layer in enumerate(layers):
            own, cross = (None, None) if state is None else state[2 * index : 2 * index + 2]
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                run = functools.partial(_by_itself, layer) if any(True for _ in position.parameters()) else layer
                x_BTD = checkpoint(run, x_BTD, seq, memory, own, cross, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, seq, memory, own, cross)
        hidden_BTD = _like(x_BTD, norm, norm(x_BTD))
        scored = stack == "decoder" or self.topology == "encoder"
        return hidden_BTD * self.output_scale if scored and self.output_scale != 1.0 else hidden_BTD

    def _side(self, stack: Literal["encoder", "decoder"]) -> tuple[Position, nn.Module | None]:
        """Return the positions of a stack and the norm after them."""
        position, norm = (self.decoder_position, self.decoder_embedding_norm) if stack == "decoder" else (None, None)
        return position or self.position, norm or self.embedding_norm

    @property
    def _runs_compiled(self) -> bool:
        """Whether ``compile`` was called and this is training: other passes have too many shapes of their own."""
        return self._compiled_call_impl is not None and torch.is_grad_enabled()

    def forward(
        self,
        stack: Literal["encoder", "decoder"],
        ids_BT: Tensor,
        where: tuple[Tensor, Tensor | None, Tensor | None],
        read: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:
        """Return the hidden states of a stack of layers: what ``compile`` has compiled, for training.

        Only tensors go in: torch.compile would guard other objects again in every step.

        Args:
            stack: which of the two.
            ids_BT: token ids.
            where: positions, segments and types of the ids.
            read: the memory to read, with its positions, segments and types.
        """
        memory = None if read is None else Memory(read[0], Sequence(*read[1:3], self.position))
        return self._run(stack, ids_BT, Sequence(*where[:2], types_BT=where[2]), memory)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile training passes by ``torch.compile``, which gets the arguments."""
        torch.compiler.reset()  # torch keeps eight graphs of a class: a ninth network would silently run uncompiled
        # Without the hooks around ``forward``: FSDP has the same ones around ``encode`` and ``decode``.
        self._compiled_call_impl = torch.compile(self.forward, *args, **kwargs)

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

    def scored(self, share: float | None) -> float:
        """Return a head's ``scored_share``, with its default filled in: all of a decoder's positions."""
        return float(self.topology != "encoder") if share is None else share

    def quieten(self, scored_share: float | None) -> None:
        """Let scores over the vocabulary start near uniform where each position would score its own token."""
        side: Literal["encoder", "decoder"] = "encoder" if self.topology == "encoder" else "decoder"
        layers, norm = self._stack(side)
        last = layers[-1]
        assert isinstance(last, Layer)
        if self.output is None and self.scored(scored_share):
            norm = norm if last.norm_first else last.feedforward_norm
            plain = last.norm_first and self.embedding_norm is None
            scales = self.embedding_scale, self.output_scale * self.output_multiplier
            quieten(norm, self._side(side)[0], self.embedding.num_embeddings, plain, scales)

    def _stack(self, side: Literal["encoder", "decoder"]) -> tuple[nn.ModuleList, nn.Module]:
        return (self.encoder, self.encoder_norm) if side == "encoder" else (self.decoder, self.decoder_norm)

    def flops_per_position(self, length: int, scored_share: float | None = None) -> float:
        """Return forward FLOPs a position at this length: two a weight of every matrix, and each variant's mixing.

        The embedding table is looked up, not multiplied; tied or not, the output matrix counts once. In an
        encoder-decoder the number is for one source position plus one target position.

        Args:
            length: positions of a sequence, in an encoder-decoder of both.
            scored_share: share of the positions that are multiplied with the output matrix (of an encoder-decoder, the
                target's); None: none of an encoder's, all of a decoder's.
        """
        share = self.scored(scored_share)
        if self.topology == "encoder":
            return self.encoder_flops(length, share)
        source = self.encoder_flops(length) if self.topology == "encoder_decoder" else 0.0
        return source + self.decoder_flops(length, length, share)

    def encoder_flops(self, length: int, scored_share: float = 0.0) -> float:
        """Return forward FLOPs for each source position, what cross-attention projects of it included."""
        flops = _stack_flops(self.encoder, length) + 2.0 * self._memory_weights
        return flops + scored_share * 2.0 * self.output_weight_VD.numel()

    def decoder_flops(self, length: int, memory_length: int = 0, scored_share: float = 1.0) -> float:
        """Return forward FLOPs for each target position, at this length of the target and of the source."""
        flops = _stack_flops(self.decoder, length, memory_length) - 2.0 * self._memory_weights
        return flops + scored_share * 2.0 * self.output_weight_VD.numel()

    @functools.cached_property
    def _memory_weights(self) -> int:
        """Number of cross-attention's weights that multiply positions of the memory: keys and values."""
        if self.topology != "encoder_decoder":
            return 0
        found: list[int] = []

        def count(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(module.weight.numel() if inputs[0].shape[1] == 3 else 0)

        # Two positions read three, without memory: the lengths show which of the two a map is applied to.
        layers = [cast(Layer, layer) for layer in self.decoder]
        crosses = copy.deepcopy(nn.ModuleList([layer.cross for layer in layers if layer.cross])).to("meta").eval()
        maps = [module for module in crosses.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_hook(count) for module in maps]
        x_BTD = self.embedding.weight.new_empty(1, 3, self.embedding.embedding_dim, device="meta")
        try:
            for cross in crosses:
                cross(x_BTD[:, :2], Sequence.dense(2, "meta"), memory=Memory(x_BTD, Sequence.dense(3, "meta")))
        except NotImplementedError:  # an operation that needs memory: all of it counts for the targets
            return 0
        finally:
            for hook in hooks:
                hook.remove()
        return sum(found)

    def num_parameters(self) -> dict[str, int]:
        """Return the number of parameters: ``embedding`` (token and position tables), ``non_embedding``, ``total``."""
        total = sum(p.numel() for p in self.parameters())
        embedding = sum(p.numel() for name, p in self.named_parameters() if is_embedding(name))
        return {"embedding": embedding, "non_embedding": total - embedding, "total": total}


def _by_itself(layer: nn.Module, x_BTD: Tensor, seq: Sequence, *rest: Any) -> Tensor:
    """Return a layer's output without what others left in the memo: its second pass has to do what the first did."""
    y_BTD: Tensor = layer(x_BTD, dataclasses.replace(seq, memo={}), *rest)
    return y_BTD


def _stack_flops(layers: nn.ModuleList, length: int, memory_length: int = 0) -> float:
    """Return FLOPs a position of layers at this length; their cross-attention reads ``memory_length`` positions."""
    flops = 2.0 * sum(p.numel() for p in layers.parameters() if p.dim() >= 2)
    for module in layers.modules():
        if isinstance(module, Attention):
            flops += module.mixing_flops(memory_length if module.role == "cross" else length)
    return flops


def _tensors(seq: Sequence) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return seq.positions_BT, seq.segments_BT, seq.types_BT
