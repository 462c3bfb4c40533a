"""Weighted sums along a sequence in time linear in its length: pairs within a chunk, running sums between chunks.

In chunks after Hua et al. 2022, arXiv:2202.10447, and Sun et al. 2023, arXiv:2307.08621. An example with chunks of two
columns, every q . k = 1 and a decay of g per step, so that y3 has to be v3 + g v2 + g^2 v1 + g^3 v0:

    chunk      v0, v1               v2, v3
    pairs      v0, v1 + g v0        v2, v3 + g v2      scores of a chunk, a small matrix
    read       0, 0                 g s, g^2 s         s = what the chunk before wrote
    write      s = g v0 + v1        g v2 + v3          seen from the chunk's last column; an E x F matrix per head
    y          v0, v1 + g v0        v2 + g s, v3 + g v2 + g^2 s

The third chunk reads g^2 s + (g v2 + v3): the g^2 is what the second one keeps. If its segments were 1 2 rather than
1 1, it would read (g, 0), write (0, 1) and keep 0, so that no sum crosses documents. A decoding state holds such sums.

Here N is the number of chunks, C the columns of a chunk, E the width of queries and keys, F that of values and M the
number of documents. A lower-case letter is a dimension that may be 1 where all rows or all heads are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.contracts import Role
from llmkit.ops.backend import autocast_dtype, without_autocast
from llmkit.sequence import Sequence, State
from llmkit_plugins.attention.cache import segments_or_ones

CHUNK = 128
"""Most columns of a chunk."""


class Chunks:
    """A sequence cut into chunks: who sees whom in a chunk, and what is carried to the next one.

    A pair of columns of one document, not ahead if causal, counts ``exp(-rate * distance)``. Distances count real
    columns only. Padding sees padding of its own chunk; nothing else sees padding.

    Args:
        seq: the sequence; padding may stand anywhere.
        causal: whether no column sees a later one.
        state: when decoding, what ``empty_state`` returned; it is updated to the end of the sequence.
        rate_H: how fast each head forgets; None: not at all.
    """

    def __init__(self, seq: Sequence, *, causal: bool, state: State | None, rate_H: Tensor | None = None) -> None:
        self.state = state
        self.is_step = state is not None and causal and seq.segments_BT is None and seq.positions_BT.shape[1] == 1
        if self.is_step:
            assert state is not None
            state["segment"] = state["segment"].clamp(min=1)  # 0: there was only padding before
            state.length += 1
            self.keep_H11 = None if rate_H is None else torch.exp(-rate_H)[:, None, None]
            return
        segments_bT = segments_or_ones(seq)
        before_b = torch.zeros_like(segments_bT[:, 0])
        self.length = segments_bT.shape[1]
        if state is not None:
            before_b = state["segment"]
            segments_bT = segments_bT.expand(len(before_b), -1)
            state["segment"] = torch.maximum(before_b, segments_bT.amax(-1))
            state.length += self.length
        self.size = min(CHUNK, self.length)
        self.number = -(-self.length // self.size)

        segments_bT = F.pad(segments_bT, (0, self.number * self.size - self.length))
        segments_bNC = segments_bT.unflatten(1, (self.number, self.size))
        rank_bNC = (segments_bNC > 0).cumsum(-1)
        distance_bNCC = (rank_bNC[..., :, None] - rank_bNC[..., None, :]).abs()
        seen_bNCC = segments_bNC[..., :, None] == segments_bNC[..., None, :]
        self.weight_bhNCC = _decayed(seen_bNCC.tril() if causal else seen_bNCC, distance_bNCC, rate_H)
        self.past = _carry(segments_bNC, before_b, rate_H)
        self.future: Carry | None = None
        if not causal:
            backwards_bNC = reverse(segments_bT).view_as(segments_bNC)
            self.future = _carry(backwards_bNC, torch.zeros_like(before_b), rate_H)

    def mix(self, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTF: Tensor, name: str) -> Tensor:
        """Return the sum of ``weight * (q . k) * v`` over what each column sees, (B, H, T, F), at least in float32.

        Args:
            q_BHTE: queries.
            k_BHTE: keys.
            v_BHTF: values.
            name: the entry of the state with the sum of keys times values of earlier columns.
        """
        return _without_float16(self._step if self.is_step else self._mix, q_BHTE, k_BHTE, v_BHTF, name)

    def _step(self, q_BH1E: Tensor, k_BH1E: Tensor, v_BH1F: Tensor, name: str) -> Tensor:
        """Do what ``_mix`` does for one new column of the document so far: a few kernels instead of dozens."""
        assert self.state is not None
        sums_BHEF, dtype = self.state[name], v_BH1F.dtype
        exact = sums_BHEF.dtype
        if self.keep_H11 is not None:
            sums_BHEF = sums_BHEF * self.keep_H11.to(exact)
        self.state[name] = sums_BHEF = torch.addcmul(sums_BHEF, k_BH1E.mT.to(exact), v_BH1F.to(exact))
        return (q_BH1E.to(dtype) @ sums_BHEF.to(dtype)).to(exact)

    def _mix(self, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTF: Tensor, name: str) -> Tensor:
        exact = torch.promote_types(v_BHTF.dtype, torch.float32)
        q_BHNCE, k_BHNCE, v_BHNCF = (self._cut(x.to(v_BHTF.dtype)) for x in (q_BHTE, k_BHTE, v_BHTF))
        scores_BHNCC = (q_BHNCE @ k_BHNCE.mT) * self.weight_bhNCC.to(v_BHTF.dtype)
        y_BHNCF = (scores_BHNCC @ v_BHNCF).to(exact)

        B, H, _, E = k_BHTE.shape
        nothing_BHEF = v_BHTF.new_zeros(B, H, E, v_BHTF.shape[-1], dtype=exact)
        start_BHEF = nothing_BHEF if self.state is None else self.state[name]
        past_BHNCF, end_BHEF = _carried(self.past, q_BHNCE, k_BHNCE, v_BHNCF, start_BHEF)
        y_BHNCF = y_BHNCF + past_BHNCF
        if self.state is not None:
            self.state[name] = end_BHEF
        if self.future is not None:
            q_BHNCE, k_BHNCE, v_BHNCF = (x.flip(2, 3) for x in (q_BHNCE, k_BHNCE, v_BHNCF))
            future_BHNCF, _ = _carried(self.future, q_BHNCE, k_BHNCE, v_BHNCF, nothing_BHEF)
            y_BHNCF = y_BHNCF + future_BHNCF.flip(2, 3)
        return y_BHNCF.flatten(2, 3)[:, :, : self.length]

    def _cut(self, x_BHTE: Tensor) -> Tensor:
        x_BHTE = F.pad(x_BHTE, (0, 0, 0, self.number * self.size - self.length))
        x_BHNCE: Tensor = x_BHTE.unflatten(2, (self.number, self.size))
        return x_BHNCE


def empty_state(like: Tensor, batch_size: int, **shapes: tuple[int, int, int]) -> State:
    """Return empty sums, (B, H, E, F) by name and at least in float32, and the number of their document, (B,)."""
    exact = torch.promote_types(like.dtype, torch.float32)
    sums = {name: like.new_zeros(batch_size, *shape, dtype=exact) for name, shape in shapes.items()}
    return State(**sums, segment=like.new_ones(batch_size, dtype=torch.long))


def flops(role: Role, length: int, keys: int, values: int, num_heads: int) -> float:
    """Return the FLOPs per position of mixing keys and values of these widths, all heads together.

    Pairs within a chunk, half of them when causal, and a matrix of each head that is written and read; both ways when
    bidirectional, and the matrix alone for ``cross``.
    """
    pairs = 2.0 * min(CHUNK, length) * (keys + values)
    matrix = 4.0 * keys * values / num_heads
    return {"causal": 0.5 * pairs + matrix, "bidirectional": pairs + 2 * matrix, "cross": matrix}[role]


def reverse(segments_BT: Tensor) -> Tensor:
    """Return the segments of the rows read backwards, again rising from document to document."""
    renumbered_BT = segments_BT.amax(-1, keepdim=True) + 1 - segments_BT  # 1 1 2 0 becomes 2 2 1 0, then 0 1 2 2
    return renumbered_BT.masked_fill(segments_BT == 0, 0).flip(-1)


def document_sums(k_BHSE: Tensor, v_BHSF: Tensor, seq: Sequence) -> Tensor:
    """Return the sum of keys times values over each document, (B, M, H, E, F)."""
    return _without_float16(_document_sums, k_BHSE, v_BHSF, seq)


def _document_sums(k_BHSE: Tensor, v_BHSF: Tensor, seq: Sequence) -> Tensor:
    k_BHSE = k_BHSE.to(v_BHSF.dtype)
    if seq.segments_BT is None:
        return (k_BHSE.mT @ v_BHSF)[:, None]
    if "document_count" not in seq.memo:  # which waits for an accelerator: once, not in each layer
        seq.memo["document_count"] = max(1, int(seq.segments_BT.max()))
    documents = seq.memo["document_count"]
    own_BM1S1 = _membership(seq.segments_BT, documents).to(k_BHSE.dtype)
    return (k_BHSE[:, None] * own_BM1S1).mT @ v_BHSF[:, None]


def read_documents(q_BHTE: Tensor, sums_BMHEF: Tensor, seq: Sequence) -> Tensor:
    """Return each query times the sums of its own document, (B, H, T, F); padding reads the first document."""
    return _without_float16(_read_documents, q_BHTE, sums_BMHEF, seq)


def _read_documents(q_BHTE: Tensor, sums_BMHEF: Tensor, seq: Sequence) -> Tensor:
    sums_BMHEF = sums_BMHEF.to(q_BHTE.dtype)
    own_bM1T1 = _membership(segments_or_ones(seq).clamp(min=1), sums_BMHEF.shape[1]).to(q_BHTE.dtype)
    return ((q_BHTE[:, None] * own_bM1T1) @ sums_BMHEF).sum(1)


def pairs(seq: Sequence, *, causal: bool, rate_H: Tensor | None = None) -> Tensor:
    """Return how much each pair of columns counts in ``Chunks.mix``, written out, (b, h, T, T); 0: not seen."""
    segments_bT = segments_or_ones(seq)
    rank_bT = (segments_bT > 0).cumsum(-1)
    distance_bTT = (rank_bT[:, :, None] - rank_bT[:, None]).abs()
    seen_bTT = segments_bT[:, :, None] == segments_bT[:, None]
    return _decayed(seen_bTT.tril() if causal else seen_bTT, distance_bTT, rate_H)


class Carry(NamedTuple):
    """How the sums over a document pass from chunk to chunk; see the example at the top."""

    read_bhNC: Tensor
    """How much a query counts the sums that come into its chunk."""
    write_bhNC: Tensor
    """How much a key counts in the sums that leave its chunk."""
    keep_bhN: Tensor
    """How much of the sums that come into a chunk leaves it again."""


def _carry(segments_bNC: Tensor, before_b: Tensor, rate_H: Tensor | None) -> Carry:
    """Return how sums are carried: those of the document of the last real column so far, seen from that column."""
    rank_bNC = (segments_bNC > 0).cumsum(-1)
    running_bN = torch.cat([before_b[:, None], segments_bNC.amax(-1)], 1).cummax(1).values
    before_bN, after_bN = running_bN[:, :-1], running_bN[:, 1:]
    return Carry(
        read_bhNC=_decayed(segments_bNC == before_bN[..., None], rank_bNC, rate_H),
        write_bhNC=_decayed(segments_bNC == after_bN[..., None], rank_bNC[..., -1:] - rank_bNC, rate_H),
        keep_bhN=_decayed(before_bN == after_bN, rank_bNC[..., -1], rate_H),
    )


def _carried(
    carry: Carry, q_BHNCE: Tensor, k_BHNCE: Tensor, v_BHNCF: Tensor, sums_BHEF: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the queries read from the chunks before their own, and the sums after the last chunk."""
    dtype, exact = v_BHNCF.dtype, sums_BHEF.dtype
    keep_bhN11 = carry.keep_bhN[..., None, None].to(exact)
    new_BHNEF = ((k_BHNCE * carry.write_bhNC[..., None].to(dtype)).mT @ v_BHNCF).to(exact)
    before: list[Tensor] = []
    for n in range(v_BHNCF.shape[2]):
        before.append(sums_BHEF)
        sums_BHEF = keep_bhN11[:, :, n] * sums_BHEF + new_BHNEF[:, :, n]
    read_BHNCE = q_BHNCE * carry.read_bhNC[..., None].to(dtype)
    return (read_BHNCE @ torch.stack(before, 2).to(dtype)).to(exact), sums_BHEF


def _decayed(seen_b: Tensor, distance_b: Tensor, rate_H: Tensor | None) -> Tensor:
    """Return what is seen as weights that fall with the distance; the heads become the second dimension."""
    if rate_H is None:
        return seen_b[:, None]
    rate = rate_H.view(-1, *[1] * (distance_b.dim() - 1))
    return seen_b[:, None] * torch.exp(-rate * distance_b[:, None])


def _without_float16(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function of tensors in float32 where it would run in float16: sums over a long text exceed 65,504."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if torch.float16 not in {autocast_dtype(x) or x.dtype for x in tensors}:
        return function(*arguments)
    with without_autocast(tensors[0]):
        return function(*(x.float() if isinstance(x, Tensor) else x for x in arguments))


def _membership(segments_bT: Tensor, documents: int) -> Tensor:
    """Return whether each column is of each document, (b, M, 1, T, 1)."""
    numbers_M = torch.arange(1, documents + 1, device=segments_bT.device)
    return (segments_bT[:, None] == numbers_M[:, None])[:, :, None, :, None]
