"""Recurrent networks in the place of attention."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llmkit.contracts import Attention, Role
from llmkit.ops.backend import without_autocast
from llmkit.ops.fused import fused
from llmkit.sequence import Memory, Sequence, State, positions_in_segments
from llmkit_plugins.attention.heads import check_directions

PADDED = 1.33
"""On a CPU documents are padded to rows of equal length where that makes at most this many times as many elements:
kernels for rows take half the time of those for packed sequences."""


class Documents(NamedTuple):
    """The documents of a batch as one packed sequence: step by step, longest document first.

    The segments [[1, 1, 1, 2], [1, 0, 1, 0]] hold the documents a0 a1 a2, c0 and b0 b1. Packed they are a0 b0 c0,
    a1 b1, a2: ``batch_sizes`` is 3, 2, 1 and ``columns_N`` 0 4 3, 1 6, 2. M is the number of documents, L the length
    of the longest.
    """

    columns_N: Tensor
    """Where each packed element stands in the flattened (B, T)."""
    slots_N: Tensor
    """Where it stands in the flattened (M, L), one document a row."""
    backward_N: Tensor
    """Where it stands there when each document is reversed."""
    batch_sizes: Tensor
    """How many documents reach each step; on the CPU."""
    row_M: Tensor
    number_M: Tensor
    """Row and segment number of each document."""
    last_M: Tensor
    """Whether it is the last document of its row."""


def documents(segments_BT: Tensor) -> Documents:
    """Find the documents of a batch; padding may stand anywhere."""
    real_BT = segments_BT > 0
    previous_BT = F.pad(segments_BT.cummax(-1).values[:, :-1], (1, 0))
    start_BT = real_BT & (segments_BT > previous_BT)
    columns = real_BT.flatten().nonzero().squeeze(1)
    document = (start_BT.flatten().cumsum(0) - 1)[columns]
    place = positions_in_segments(segments_BT).flatten()[columns]

    length_M = document.bincount()
    order_M = length_M.argsort(descending=True)
    rank = order_M.argsort()[document]
    packed = (place * len(order_M) + rank).argsort()
    sizes = place.bincount()
    row = rank * len(sizes)

    row_M, column_M = start_BT.nonzero()[order_M].unbind(1)
    count_BT = start_BT.cumsum(-1)
    return Documents(
        columns_N=columns[packed],
        slots_N=(row + place)[packed],
        backward_N=(row + length_M[document] - 1 - place)[packed],
        batch_sizes=sizes.cpu(),
        row_M=row_M,
        number_M=segments_BT[row_M, column_M],
        last_M=count_BT[row_M, column_M] == count_BT[row_M, -1],
    )


class Recurrent(Attention):
    """A recurrent network along the sequence that starts from zero with every document.

    It runs in single precision in a model of half precision, and under autocast: what is carried is a running sum, and
    a gate close to 1 adds less to it than half precision can hold.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})
    names: ClassVar[tuple[str, ...]]
    """What the recurrence carries from one position to the next."""

    def __init__(self, dim: int, role: Role, network: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__(dim, role)
        check_directions(dim, role)
        both = role == "bidirectional"
        width = dim // 2 if both else dim
        self.rnn = network(dim, width, batch_first=True, bidirectional=both)
        gates = [width] * (4 if network is nn.LSTM else 3)
        fused(self.rnn, gates, *(name for name, _ in self.rnn.named_parameters() if name.startswith("weight")))

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the outputs of the recurrence, (B, T, D), zero at padding; see ``Attention.forward``."""
        if seq.segments_BT is not None:
            return self._documents(x_BTD, seq, seq.segments_BT, state)
        if state is None:
            return self._run(x_BTD, None)[0]
        y_BTD, last = self._run(x_BTD, [state[name] for name in self.names])
        state.update(zip(self.names, last, strict=True))
        state.length += x_BTD.shape[1]
        return y_BTD

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return zeros for what is carried, (B, D) each and at least in float32; the length has no limit."""
        if self.role != "causal":
            return None
        exact = torch.promote_types(like.dtype, torch.float32)
        return State({name: like.new_zeros(batch_size, self.dim, dtype=exact) for name in self.names})

    def _documents(self, x_BTD: Tensor, seq: Sequence, segments_BT: Tensor, state: State | None) -> Tensor:
        """Run all documents of the batch side by side, each from its own start."""
        if "documents" not in seq.memo:
            seq.memo["documents"] = documents(segments_BT)
        docs: Documents = seq.memo["documents"]
        if state is not None:
            state.length += x_BTD.shape[1]
        if not len(docs.batch_sizes):
            return torch.zeros_like(x_BTD)
        x_ZD, real = x_BTD.flatten(0, 1), len(docs.columns_N)
        padded = len(docs.row_M) * len(docs.batch_sizes)
        if state is None and x_ZD.device.type == "cpu" and padded <= PADDED * real:
            y_ND = self._padded(x_ZD, docs)
        else:
            y_ND = self._packed(x_ZD.index_select(0, docs.columns_N), docs, segments_BT, state)
        y_ZD = y_ND.new_zeros(segments_BT.numel(), self.dim)
        return y_ZD.index_copy(0, docs.columns_N, y_ND).view(x_BTD.shape)

    def _packed(self, x_ND: Tensor, docs: Documents, segments_BT: Tensor, state: State | None) -> Tensor:
        """Return the outputs of packed documents, x_ND, and update the state."""
        start = None
        if state is not None:
            if "segment" not in state:
                state["segment"] = torch.ones_like(segments_BT[:, 0])
            # Only the first document of a row can continue the one that the earlier columns ended with.
            continued_M1 = (docs.number_M == state["segment"][docs.row_M])[:, None]
            start = [state[name][docs.row_M] * continued_M1 for name in self.names]

        y_ND, end = self._run(PackedSequence(x_ND, docs.batch_sizes), start)

        if state is not None:
            rows = docs.row_M[docs.last_M]  # rows of padding alone keep their state
            for name, value_MD in zip(self.names, end, strict=True):
                state[name] = state[name].index_copy(0, rows, value_MD[docs.last_M])
            state["segment"] = state["segment"].index_copy(0, rows, docs.number_M[docs.last_M])
        return y_ND

    def _padded(self, x_ZD: Tensor, docs: Documents) -> Tensor:
        """Return the outputs of documents that run as rows; padding comes last, in both directions."""
        rows, length = len(docs.row_M), len(docs.batch_sizes)
        outputs = []
        for direction, slots_N in enumerate((docs.slots_N, docs.backward_N)[: 1 + self.rnn.bidirectional]):
            columns = docs.columns_N[:1].repeat(rows * length).index_copy(0, slots_N, docs.columns_N)
            x_MLD = x_ZD.index_select(0, columns).view(rows, length, -1)
            y_MLD, _ = self._kernel(x_MLD, None, None, [direction])
            outputs.append(y_MLD.flatten(0, 1).index_select(0, slots_N))
        return torch.cat(outputs, -1)

    def _run(self, x: Tensor | PackedSequence, start: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Run the network from ``start`` (zeros if None); return outputs, without packing, and what is carried."""
        values, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
        return self._kernel(values, sizes, start, [*range(1 + self.rnn.bidirectional)])

    def _kernel(
        self, x: Tensor, sizes: Tensor | None, start: list[Tensor] | None, directions: list[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run torch's kernel in at least float32; return outputs in the dtype of ``x``, and what is carried.

        Args:
            x: inputs, (rows, length, D), or (N, D) with the ``sizes`` of a packed sequence.
            sizes: batch sizes of a packed sequence; None: rows.
            start: what is carried into the first position, (rows, D) each; None: zeros.
            directions: which ones, 0 or 1 or both.
        """
        kernel: Any = torch.lstm if isinstance(self.rnn, nn.LSTM) else torch.gru
        both = len(directions) > 1
        exact = torch.promote_types(x.dtype, torch.float32)
        rows = len(x) if sizes is None else int(sizes[0])
        if start is None:
            carried = [x.new_zeros(1 + both, rows, self.rnn.hidden_size, dtype=exact)] * len(self.names)
        else:
            carried = [value[None].to(exact) for value in start]
        first = carried if len(carried) > 1 else carried[0]
        if x.is_meta and not torch.is_grad_enabled():  # torch would step through the columns, in Python
            outputs = x.new_empty(*x.shape[:-1], (1 + both) * self.rnn.hidden_size)
            return outputs, [torch.empty_like(value[0]) for value in carried]
        settings = (True, 1, 0.0, self.training, both)  # biases, layers, dropout between layers
        quantized = getattr(self.rnn, "quantized", None)  # kernels that a compressed network brings; without gradients
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if quantized is not None and exact == torch.float32 and x.device.type == "cpu" and not differentiated:
            y, *ends = quantized(x.to(exact), sizes, first, directions, settings)
            return y.to(x.dtype), [end[0] for end in ends]
        weights = self.rnn.all_weights
        exact_weights = [weight.to(exact) for number in directions for weight in weights[number]]
        with without_autocast(x):
            if sizes is None:
                y, *ends = kernel(x.to(exact), first, exact_weights, *settings, True)  # the batch comes first
            else:
                y, *ends = kernel(x.to(exact), sizes, first, exact_weights, *settings)
        return y.to(x.dtype), [end[0] for end in ends]


class LSTM(Recurrent):
    """A long short-term memory network instead of attention; the state does not grow with the length.

    Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, in the form of ``torch.nn.LSTM``: with the forget
    gate of Gers et al. 2000, doi:10.1162/089976600300015015, with tanh for both squashing functions, without peepholes.
    The forget gate starts out open: one of its two biases is 1 (Jozefowicz et al. 2015,
    proceedings.mlr.press/v37/jozefowicz15). A bidirectional one has two directions of half the width each, 6 dim^2
    weights instead of the 8 dim^2 of a causal one, and needs no projection.

    Args:
        dim: model width; must be even for the role ``bidirectional``.
        role: ``causal`` or ``bidirectional``.

    Raises:
        UserError: when a bidirectional one has an odd width.
    """

    names: ClassVar[tuple[str, ...]] = ("h", "c")

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role, nn.LSTM)
        with torch.no_grad():
            for name, parameter in self.rnn.named_parameters():
                if name.startswith("bias_hh"):
                    parameter[self.rnn.hidden_size : 2 * self.rnn.hidden_size] = 1.0


class GRU(Recurrent):
    """A gated recurrent unit instead of attention: an LSTM with one gate and one state less.

    Cho et al. 2014 in the form of the first version, arXiv:1406.1078v1, and of ``torch.nn.GRU``: the reset gate
    multiplies U h. The published version has U (r h), which is another function. A bidirectional one has two directions
    of half the width each, 4.5 dim^2 weights instead of the 6 dim^2 of a causal one, and needs no projection.

    Args:
        dim: model width; must be even for the role ``bidirectional``.
        role: ``causal`` or ``bidirectional``.

    Raises:
        UserError: when a bidirectional one has an odd width.
    """

    names: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role, nn.GRU)
