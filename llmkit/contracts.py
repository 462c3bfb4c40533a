"""All a plugin author reads: what a tokenizer, an attention variant, a head and the small parts must do.

Shape suffixes used in the whole project:

    B batch      T query positions    S key or memory positions    D model width (``dim``)
    H heads      E width of one head  V vocabulary                 N rows of a flattened (B, T)
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmkit.errors import note

Topology = Literal["decoder", "encoder", "encoder_decoder"]
Role = Literal["causal", "bidirectional", "cross"]
Stage = Literal["train", "validation", "test", "predict"]
Batch = dict[str, Tensor]

IGNORE = -100  # a target with this value is not predicted (padding)


class Tokenizer(ABC):
    """Text to ids and back.

    A tokenizer is built from plain arguments, then either trained on texts or restored from its JSON state, which
    travels inside every checkpoint. Ids of special tokens are never produced from plain text.
    """

    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    sep_id: int
    lossless: bool = True
    """Whether ``decode`` gives back, to the character, each text that was encoded without the unknown token."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ones included; every id is in ``range(vocab_size)``."""

    @property
    @abstractmethod
    def trained(self) -> bool:
        """Whether it can encode: true after ``train`` or ``from_state``, and always for a pretrained one."""

    @abstractmethod
    def train(self, texts: Iterator[str]) -> None:
        """Learn the vocabulary from ``texts``, the training split only."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without adding special ids."""

    @abstractmethod
    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        """Return the text of each list of ids; special ids are left out."""

    @abstractmethod
    def to_state(self) -> str:
        """Return everything learned as a JSON string."""

    @abstractmethod
    def from_state(self, state: str) -> None:
        """Restore what ``to_state`` returned. Raises ValueError when the string is not such a state."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self.encode_batch([text])[0]

    def decode(self, ids: list[int]) -> str:
        """Return the text of one list of ids."""
        return self.decode_batch([ids])[0]


class Position(nn.Module):
    """How a network knows the order of positions. Override one of the three methods; the others do nothing.

    Built once per network as ``Position(dim, max_length)`` and shared by all its layers.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.dim = dim
        self.max_length = max_length

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add position vectors to the embeddings."""
        return x_BTD

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        """Turn queries or keys by their position, ``seq.positions_BT``; ``seq.memo`` keeps what all layers share."""
        return x_BHTE

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return what is added to the scores, (B or 1, H, T, S), from the positions of queries and keys."""
        return None


@dataclass
class Sequence:
    """Where each position of a batch stands: its place in its document and which document it belongs to.

    Attributes:
        positions_BT: place within the document, from 0; (B or 1, T).
        segments_BT: 0 for padding, 1, 2, ... for the documents packed into the row; None: one document, no padding.
            A position sees only positions of its own segment.
        position: the network's position encoding, or None where there is none.
        memo: results that all layers of one forward pass share (masks, rotation tables).
    """

    positions_BT: Tensor
    segments_BT: Tensor | None = None
    position: Position | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def dense(cls, length: int, device: torch.device | str = "cpu", start: int = 0) -> Sequence:
        """Return rows without padding that begin at position ``start``."""
        return cls(torch.arange(start, start + length, device=device)[None])

    @classmethod
    def of(cls, ids_BT: Tensor, segments_BT: Tensor | None = None) -> Sequence:
        """Return the sequence of a batch of ids, padded or packed as the segments say."""
        return cls.dense(ids_BT.shape[1], ids_BT.device) if segments_BT is None else cls.from_segments(segments_BT)

    @classmethod
    def from_segments(cls, segments_BT: Tensor) -> Sequence:
        """Return a sequence whose positions count the real positions of each document from 0."""
        return cls(positions_in_segments(segments_BT), segments_BT)

    def rotate(self, x_BHTE: Tensor) -> Tensor:
        """Turn queries or keys of this sequence by their positions (rotary encodings)."""
        return x_BHTE if self.position is None else self.position.rotate(x_BHTE, self)

    def bias(self, key: Sequence, num_heads: int) -> Tensor | None:
        """Return the position bias of this sequence's queries against ``key``'s keys, (B or 1, H, T, S), or None."""
        if self.position is None:
            return None
        return self.position.bias(self.positions_BT, key.positions_BT, num_heads)

    def mask(self, key: Sequence | None = None, *, causal: bool) -> Tensor | None:
        """Return which keys each query may look at, (B or 1, 1, T, S) with True for yes, or None for all of them.

        Without ``key`` the sequence looks at itself. When there are more keys than queries, the queries are the last
        positions of the keys (cached decoding). Every row of the mask has at least one True for real memory.
        """
        if key is self:
            key = None
        memo_key = ("mask", id(key), causal)
        if memo_key not in self.memo:
            # The key is kept beside the mask, so that its id cannot be given to another object meanwhile; not this
            # sequence itself, for FSDP walks through what it is handed and would go round in circles.
            self.memo[memo_key] = (key, self._mask(self if key is None else key, causal))
        mask: Tensor | None = self.memo[memo_key][1]
        return mask

    def _mask(self, key: Sequence, causal: bool) -> Tensor | None:
        length, key_length = self.positions_BT.shape[-1], key.positions_BT.shape[-1]
        mask: Tensor | None = None
        if causal and length > 1:
            # Column j of the keys is visible to query i when it is not later than the query's own column.
            ones = torch.ones(length, key_length, dtype=torch.bool, device=self.positions_BT.device)
            mask = ones.tril(key_length - length)[None, None]
        if self.segments_BT is not None or key.segments_BT is not None:
            query_segments = self._segments_or_ones()
            if key is not self and not causal:
                # In cross-attention a padded query reads the first document: a row without any key would be NaN.
                query_segments = query_segments.clamp(min=1)
            same = query_segments[:, None, :, None] == key._segments_or_ones()[:, None, None, :]
            mask = same if mask is None else mask & same
        return mask

    def _segments_or_ones(self) -> Tensor:
        return torch.ones_like(self.positions_BT) if self.segments_BT is None else self.segments_BT


def positions_in_segments(segments_BT: Tensor) -> Tensor:
    """Return each position's place within its run of equal segments, padding not counted; padding gets 0.

    Padding may stand anywhere. A document is one run of a row: its number must not come back later in that row.
    """
    real = segments_BT > 0
    rank = real.cumsum(-1) - 1  # how many real positions came before, in the row
    previous = torch.nn.functional.pad(segments_BT.cummax(-1).values[:, :-1], (1, 0))
    start = real & (segments_BT > previous)
    start_rank = torch.where(start, rank, torch.zeros_like(rank)).cummax(-1).values
    return torch.where(real, rank - start_rank, torch.zeros_like(rank))


class State(dict[str, Tensor]):
    """Decoding state of one layer: tensors whose first dimension is the batch, and how many columns were seen.

    The variant owns what is in it (keys and values, or h and c) and changes it in place.
    """

    length: int = 0
    of_memory: bool = False
    """Whether all of it comes from an encoder's memory: beams of one text then hold the same, and are not reordered."""

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (beam search)."""
        for name, value in self.items():
            self[name] = value.index_select(0, rows)


class Memory(NamedTuple):
    """What an encoder hands to cross-attention."""

    x_BSD: Tensor
    seq: Sequence

    def take(self, rows: Tensor) -> Memory:
        """Return the memory of the given rows of the batch, in that order."""
        positions, segments = self.seq.positions_BT, self.seq.segments_BT
        kept = Sequence(
            positions if len(positions) == 1 else positions[rows], None if segments is None else segments[rows]
        )
        return Memory(self.x_BSD[rows], kept)


class Attention(nn.Module, ABC):
    """A module that mixes information along the sequence: softmax attention, a linear form, or an LSTM.

    Built once per layer as ``Variant(dim, role, **init_args)``. It owns its masking: a ``causal`` one never looks
    ahead, and no role looks across segments or at padding. ``seq.mask(...)`` gives the mask ready-made.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal"})
    """What it can be built as. The network refuses a head that needs another role."""

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__()
        self.dim = dim
        self.role: Role = role

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D).

        Args:
            x_BTD: the layer's input.
            seq: positions, segments and padding of ``x_BTD``.
            memory: the encoder's output; given exactly when the role is ``cross``.
            state: when decoding, what ``init_state`` returned; the call continues after the columns already seen,
                and the result must equal the same columns of one full forward pass.
        """

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty decoding state for ``max_length`` columns, in ``like``'s dtype and device.

        None says that the variant keeps no state; decoding then runs the full forward pass for each new token.
        """
        return None

    def mixing_flops(self, length: int) -> float:
        """Forward FLOPs per position at this length beyond two per weight (scores and weighted sums); default 0."""
        return 0.0


class Feedforward(nn.Module, ABC):
    """The per-position network of a layer, built as ``Feedforward(dim)``; (B, T, D) to (B, T, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the new values, position by position."""


class Norm(nn.Module, ABC):
    """Normalisation over the last dimension, built as ``Norm(dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised values, in the input's shape."""


class Network(ABC):
    """What a head sees of the network: hidden states in, never its parts."""

    @abstractmethod
    def encode(self, ids_BT: Tensor, seq: Sequence) -> Memory:
        """Run the bidirectional encoder (topologies ``encoder`` and ``encoder_decoder``)."""

    @abstractmethod
    def decode(
        self, ids_BT: Tensor, seq: Sequence, *, memory: Memory | None = None, state: list[State] | None = None
    ) -> Tensor:
        """Run the causal decoder and return its hidden states, (B, T, D)."""

    @abstractmethod
    def init_state(self, batch_size: int, max_length: int) -> list[State] | None:
        """Return one empty decoding state a layer part, or None when a variant keeps none."""

    @property
    @abstractmethod
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into scores over the vocabulary."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The context: the most positions of one sequence."""


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and what it was summed over, so that no number depends on how rows were batched."""

    total: Tensor
    """Sum of the losses in nats, a scalar that carries the gradient."""
    count: Tensor
    """Number of tokens or examples in the sum."""


@dataclass(frozen=True)
class DecodingOptions:
    """How text is generated.

    Attributes:
        max_new_tokens: most tokens to add; None: as many as the head finds fit.
        temperature: divides the scores before sampling; 0 is greedy.
        top_k: sample among the k best tokens only; 0 is off.
        top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751).
        num_beams: width of the beam search; 1 is off. With beams the temperature is not used.
        length_penalty: beam scores are divided by ((5 + length) / 6) ** penalty (Wu et al. 2016, arXiv:1609.08144).
        seed: seed of the sampling.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")


class Head(nn.Module, ABC):
    """A task: what it reads from a row, how rows become tensors, the loss, the metrics, the prediction.

    Life of a head: ``__init__`` with plain arguments; ``learn`` from the training rows (label names, say) or
    ``set_info`` from a checkpoint; ``build`` its layers; then ``loss``, ``evaluate`` and ``predict`` on batches.
    """

    topology: ClassVar[Topology]
    layout: ClassVar[Literal["blocks", "examples"]] = "examples"
    """``blocks``: rows are joined into one long stream of tokens, cut into blocks. ``examples``: one row, one item."""
    inputs: ClassVar[tuple[str, ...]]
    """Fields of a row needed to predict."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Further fields needed to train."""
    texts: ClassVar[tuple[str, ...]]
    """The fields that are text; a new tokenizer is trained on them."""
    words: ClassVar[Mapping[str, Callable[[Any], list[str]]]] = {}
    """Fields that are encoded word by word, and what cuts a value into the pieces that are encoded: a new tokenizer is
    trained on the pieces. Such a field that is not in ``texts`` may hold a list of words as well as a text."""
    kept: ClassVar[str] = "start"
    """Which part of a text longer than the context is used: its ``start`` or its ``end``."""
    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    """The metric that decides which checkpoint is the best, and its better side."""
    decoding: DecodingOptions = DecodingOptions()
    """How text is generated unless the caller says otherwise."""

    def __init__(self) -> None:
        super().__init__()

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Read what must be known before training from the training rows' columns (label names)."""

    def info(self) -> dict[str, Any]:
        """Return what ``learn`` found, as JSON-able data for the checkpoint."""
        return {}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what ``info`` returned."""

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take what ``loss`` needs of the trained tokenizer (the id of its mask token); called before ``build``."""

    def build(self, dim: int, vocab_size: int) -> None:
        """Create the head's own layers."""

    @abstractmethod
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
        """Turn rows (column by column) into features (likewise), of plain ints and lists of ints.

        Target fields may be missing when predicting. Called in batches. The feature ``length`` is the item's cost in
        tokens, which batches are bucketed by, and ``skew``, where there is one, what items of equal length are sorted
        by: how much longer one padded text is than the other. ``truncated`` is 1 for a text cut to the context.
        """

    @abstractmethod
    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Turn items of features into one batch of tensors."""

    @abstractmethod
    def loss(self, net: Network, batch: Batch) -> Loss:
        """Return the training loss of a batch."""

    @abstractmethod
    def metrics(self, stage: Stage) -> dict[str, nn.Module]:
        """Return fresh torchmetrics by name. Scalars are logged as ``val_<name>`` or ``test_<name>``."""

    @abstractmethod
    def evaluate(self, net: Network, batch: Batch, metrics: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Update the metrics with a batch."""

    @abstractmethod
    def predict(
        self, net: Network, batch: Batch, tokenizer: Tokenizer, options: DecodingOptions
    ) -> list[dict[str, Any]]:
        """Return one JSON-able answer a row of the batch."""

    def show(self, answer: dict[str, Any]) -> str:
        """Return one answer as a person reads it."""
        return json.dumps(answer, ensure_ascii=False)

    def sample(self, net: Network, batch: Batch, tokenizer: Tokenizer) -> str | None:
        """Return a short piece of the head's work on a validation batch, shown at the end of a run."""
        rows = {name: value[:2] if value.dim() else value for name, value in batch.items()}
        answers = self.predict(net, rows, tokenizer, self.decoding)
        return "\n".join(self.show(answer) for answer in answers)


def note_truncated(head: Head, truncated: Iterable[int] | None, total: int, context: int, where: str = "") -> None:
    """Tell how many texts were longer than the context and what became of them."""
    count = 0 if truncated is None else sum(map(int, truncated))
    if count:
        note(
            f"{count:,} of {total:,} texts{where} are longer than model.context ({context} tokens): "
            f"the {head.kept} of each is used"
        )


def padded(rows: list[list[int]], pad: int) -> Tensor:
    """Return the rows as one tensor (B, T), filled up with ``pad`` at the right."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)


def segments_of(lengths: list[int]) -> Tensor | None:
    """Return segments (B, T) of right-padded rows of these lengths, or None when nothing is padded."""
    width = max(lengths, default=0)
    if all(length == width for length in lengths):
        return None
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
