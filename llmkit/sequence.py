"""What plugins are handed and hand back: sequences, an encoder's memory, losses, decoding state and options.

Shape suffixes as in ``llmkit.contracts``: B batch, T query positions, S key or memory positions, D model width,
H heads, E width of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class PositionEncoding(Protocol):
    """What a sequence asks of the network's ``Position``."""

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        """Turn queries or keys by their position."""

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return what is added to the scores, (B or 1, H, T, S)."""


@dataclass
class Sequence:
    """Where each position of a batch stands: its place in its document and which document it belongs to.

    Attributes:
        positions_BT: place within the document, from 0; (B or 1, T).
        segments_BT: 0 for padding, 1, 2, ... for the documents packed into the row; None: one document, no padding.
            A position sees only positions of its own segment.
        position: the network's position encoding, or None where there is none.
        memo: results that all layers of one forward pass share (masks, rotation tables).
        types_BT: which text of a pair each position belongs to, 0 or 1 (token types); None: 0 everywhere.
    """

    positions_BT: Tensor
    segments_BT: Tensor | None = None
    position: PositionEncoding | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    types_BT: Tensor | None = None

    @classmethod
    def dense(cls, length: int, device: torch.device | str = "cpu", start: int = 0) -> Sequence:
        """Return rows without padding that begin at position ``start``."""
        return cls(torch.arange(start, start + length, device=device)[None])

    @classmethod
    def of(cls, ids_BT: Tensor, segments_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Sequence:
        """Return the sequence of a batch of ids, padded or packed as the segments say."""
        seq = cls.dense(ids_BT.shape[1], ids_BT.device) if segments_BT is None else cls.from_segments(segments_BT)
        seq.types_BT = types_BT
        return seq

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
            # The key is stored with the mask, so that its id is not reused for another object in the meantime; except
            # for this sequence itself: FSDP walks through its inputs and would recurse forever.
            self.memo[memo_key] = (key, self._mask(self if key is None else key, causal))
        mask: Tensor | None = self.memo[memo_key][1]
        return mask

    def _mask(self, key: Sequence, causal: bool) -> Tensor | None:
        length, key_length = self.positions_BT.shape[-1], key.positions_BT.shape[-1]
        mask: Tensor | None = None
        if causal and length > 1:
            # Column j of the keys is visible to query i when it is not later than the query's own column.
            # Two new queries after two cached keys see 1 1 1 0 and 1 1 1 1: a triangle moved right by two.
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


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and what it was summed over, so that no number depends on how rows were batched."""

    total: Tensor
    """Sum of the losses in nats, a scalar that carries the gradient."""
    count: Tensor
    """Number of tokens or examples in the sum."""


class State(dict[str, Tensor]):
    """Decoding state of one layer: tensors whose first dimension is the batch, and how many columns were seen.

    The variant owns what is in it (keys and values, or h and c) and changes it in place.
    """

    length: int = 0
    of_memory: bool = False
    """Whether all of it comes from an encoder's memory: beams of one text then hold the same, and are not reordered."""

    def settle(self) -> None:
        """Prepare for single columns alone, so that no tensor has to change its shape; does nothing by default.

        A state whose steps then depend on nothing but tensors is replayed as a CUDA graph (``llmkit.ops.graphs``).
        """

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


@dataclass(frozen=True)
class Mixing:
    """What each position of a layer takes from which: the layer's output is ``finish(weights @ values)``.

    Softmax attention has its weights; of a recurrence, or of attention without a softmax, they are the matrix that is
    applied implicitly (Zimerman et al. 2024, arXiv:2405.16504).

    Attributes:
        values_BHSE: what is taken from each position, by head.
        weights: how much of it, (B, H, T, S); 0 where a position may not look. They may be negative and need not sum
            to one. Or, where all of them would not fit into memory, a function that returns those of some heads.
        finish: makes the output, (B, T, D), of the sums, (B, H, T, E): joins the heads, and normalises, gates or
            projects them.
        unit: what has a map of its own: a head, or a channel.
    """

    values_BHSE: Tensor
    weights: Tensor | Callable[[slice], Tensor]
    finish: Callable[[Tensor], Tensor]
    unit: Literal["head", "channel"] = "head"

    def of(self, heads: slice) -> Tensor:
        """Return the weights of some heads, (B, heads, T, S)."""
        return self.weights[:, heads] if isinstance(self.weights, Tensor) else self.weights(heads)

    def output(self) -> Tensor:
        """Return what the layer's ``forward`` returns for real positions, (B, T, D)."""
        parts = [slice(first, first + 8) for first in range(0, self.values_BHSE.shape[1], 8)]
        return self.finish(torch.cat([self.of(heads) @ self.values_BHSE[:, heads] for heads in parts], 1))


MAX_BEAMS = 1024


@dataclass(frozen=True)
class DecodingOptions:
    """How text is generated. The names are those of Hugging Face transformers; a text is the prompt and what follows.

    Attributes:
        max_new_tokens: most tokens to add; None: as many as the head finds fit.
        min_new_tokens: eos is not chosen before this many tokens were added.
        temperature: divides the scores before sampling; 0 is greedy.
        top_k: sample among the k best tokens only; 0 is off.
        top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751).
        num_beams: width of the beam search; 1 is off. With beams the temperature is not used, and top_k and top_p are
            refused.
        length_penalty: beam scores are divided by ((5 + length) / 6) ** penalty (Wu et al. 2016, arXiv:1609.08144).
        num_return_sequences: how many of the beams an answer lists, best first.
        repetition_penalty: divides positive scores of tokens that the text holds already, and multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858); of a beam search, log probabilities. 1 is off.
        no_repeat_ngram_size: no n-gram of this many tokens comes twice in a text (Paulus et al. 2018,
            arXiv:1705.04304); 0 is off.
        stop_strings: a text ends before the first of these strings that is written.
        seed: seed of the sampling. A draw is a function of the seed, the row and the position.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_strings: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        for name in ("min_new_tokens", "no_repeat_ngram_size", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens must be at most max_new_tokens, got {self.min_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty must be between -10 and 10, got {self.length_penalty}")
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise ValueError(f"num_beams must be at least 1 and at most {MAX_BEAMS}, got {self.num_beams}")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            number = self.num_return_sequences
            raise ValueError(f"num_return_sequences must be at least 1 and at most num_beams, got {number}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.stop_strings is not None and not all(self.stop_strings):
            raise ValueError("stop_strings must not hold an empty string")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")


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


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the first rows of a batch of tensors and lists; single numbers stay."""

    def first(value: Any) -> Any:
        return value[:count] if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()) else value

    return {name: first(value) for name, value in batch.items()}


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {**batch, **{name: moved(value, device) for name, value in batch.items() if isinstance(value, Tensor)}}


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for the copy to a GPU, which is made from pinned memory."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
