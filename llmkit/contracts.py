"""All a plugin author reads: what a tokenizer, an attention variant, a head and the small parts must do.

Shape suffixes used in the whole project:

    B batch      T query positions    S key or memory positions    D model width (``dim``)
    H heads      E width of one head  V vocabulary                 N rows of a flattened (B, T)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llmkit.sequence import DecodingOptions, Memory, Mixing, Sequence, State, first_rows
from llmkit.sequence import Loss as Loss

Topology = Literal["decoder", "encoder", "encoder_decoder"]
Role = Literal["causal", "bidirectional", "cross"]
Stage = Literal["train", "validation", "test", "predict"]
Batch = dict[str, Any]
"""Tensors, lists of strings and single numbers by name. ``rows`` (B,), where given: the rows' numbers in the data."""

IGNORE = -100  # a target with this value is not predicted (padding)


class Dataset(ABC):
    """Rows that are made, not read from files: ``data.train: {name: mqar, pairs: 8}``."""

    @abstractmethod
    def rows(self, split: Stage) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a split, each a value by column; the same ones whenever it is called."""


class Tokenizer(ABC):
    """Text to ids and back, trained on texts or restored from its state. Special ids never come from plain text."""

    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    sep_id: int
    lossless: bool = True
    """Whether ``decode`` gives back, to the character, each text that was encoded without the unknown token."""
    around: tuple[list[int], list[int], list[int]] = ([], [], [])
    """Ids that stand before a text, between the two of a pair, and at the end: ``[CLS] a [SEP] b [SEP]``, say."""

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
        """Return everything learned as a JSON string, which travels inside every checkpoint."""

    @abstractmethod
    def from_state(self, state: str) -> None:
        """Restore what ``to_state`` returned. Raises ValueError for any other string."""

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
        """Return an empty decoding state for ``max_length`` columns, of the kind of ``like``; None: it keeps none."""
        return None

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return what a full pass takes from where, in eval mode; None: ``llmkit explain`` shows a Jacobian."""
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
    def output_bias_V(self) -> Tensor | None:
        """What is added to these scores; None: nothing."""
        return None

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The context: the most positions of one sequence."""


class Head(nn.Module, ABC):
    """A task: what it reads from a row, how rows become a batch, the loss, the metrics, the prediction.

    Life of a head: ``__init__`` with plain arguments; ``learn`` from the training rows (label names, say) or
    ``set_info`` from a checkpoint; ``build`` its layers; then ``loss``, ``evaluate`` and ``predict`` on batches.
    """

    topology: ClassVar[Topology]
    layout: ClassVar[Literal["blocks", "examples"]] = "examples"
    """``blocks``: rows are joined into one long stream of tokens, cut into blocks. ``examples``: one row, one item."""
    inputs: ClassVar[tuple[str, ...]]  # fields of a row needed to predict
    targets: ClassVar[tuple[str, ...]] = ()  # further fields needed to train
    texts: ClassVar[tuple[str, ...]]  # the fields that are text; a new tokenizer is trained on them
    classes: ClassVar[tuple[str, ...]] = ()
    """Targets that hold a class, or a list of them; no class is set aside for validation alone."""
    words: ClassVar[Mapping[str, Callable[[Any], list[str]]]] = {}
    """What cuts a field into the pieces that are encoded. It may hold a list of words if it is not in ``texts``."""
    notes: ClassVar[Mapping[str, str]] = {}
    """Features that are 1 in rows worth a note, and what it says after ``data.train: 3 of 100 rows``."""
    scored_share: float | None = None  # of positions scored over the vocabulary by the loss; None: all of a decoder's
    passes: int = 1  # how often a step of training passes a batch through the network
    kept: ClassVar[str] = "start"  # which part of a text longer than the context is used, its ``start`` or its ``end``
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
        """Turn rows, column by column, into features, columns of ints, of lists of ints, or of strings.

        Target fields may be missing when predicting. Called in batches. The feature ``length`` is the item's cost in
        tokens, which batches are bucketed by, and ``skew``, where there is one, what items of equal length are sorted
        by: how much longer one padded text is than the other. ``truncated`` is 1 for a text cut to the context.
        """

    @abstractmethod
    def collate(self, features: list[dict[str, Any]], tokenizer: Tokenizer) -> Batch:
        """Turn items of features into one batch of tensors and lists of strings."""

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
        answers = self.predict(net, first_rows(batch, 2), tokenizer, self.decoding)
        return "\n".join(self.show(answer) for answer in answers)
