"""A gated recurrence that is computed for all positions at once."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.chunked import reverse
from llmkit_plugins.attention.heads import check_directions


class MinGRU(Attention):
    """A GRU whose gate sees the input only, so that training runs over all positions at once.

    Feng et al. 2024, arXiv:2410.01201: h = (1 - z) h + z c, with the gate z = sigmoid(W x) and the candidate c = V x,
    both with biases. It is the paper's plain form; the log-space form makes candidates positive. h is as wide as the
    model and no convolution comes before. The decoding state is h. A bidirectional one has two directions of half the
    width each.

    Args:
        dim: model width; must be even for the role ``bidirectional``.
        role: ``causal`` or ``bidirectional``.

    Raises:
        UserError: when a bidirectional one has an odd width.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(self, dim: int, role: Role) -> None:
        super().__init__(dim, role)
        check_directions(dim, role)
        self.gate, self.candidate = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return h at each position, (B, T, D); see ``Attention.forward``."""
        gate_BTD, candidate_BTD = self.gate(x_BTD), self.candidate(x_BTD)
        if self.role == "causal":
            y_BTD = recur(gate_BTD, candidate_BTD, seq.segments_BT, state)
        else:
            gates, candidates = gate_BTD.chunk(2, -1), candidate_BTD.chunk(2, -1)
            backwards = None if seq.segments_BT is None else reverse(seq.segments_BT)
            there = recur(gates[0], candidates[0], seq.segments_BT)
            back = recur(gates[1].flip(1), candidates[1].flip(1), backwards).flip(1)
            y_BTD = torch.cat([there, back], -1)
        return y_BTD.to(candidate_BTD.dtype)

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return how much of each candidate h still holds, channel by channel; one value has one channel."""
        candidate_BDT1 = self.candidate(x_BTD).mT[..., None]
        both, gate_BTD = self.role != "causal", self.gate(x_BTD)
        there = gates(gate_BTD, seq.segments_BT)
        back = gates(gate_BTD.flip(1), None if seq.segments_BT is None else reverse(seq.segments_BT))
        half = self.dim // 2 if both else self.dim

        def weights(channels: slice) -> Tensor:
            first, last, _ = channels.indices(self.dim)
            forward_BCTT = unrolled(*(x_BTD[..., first : min(last, half)] for x_BTD in there))
            if last <= half:
                return forward_BCTT
            back_BCTT = unrolled(*(x_BTD[..., max(first, half) : last] for x_BTD in back)).flip(2, 3)
            return torch.cat([forward_BCTT, back_BCTT], 1)

        return Mixing(candidate_BDT1, weights, lambda y_BDT1: y_BDT1[..., 0].mT, unit="channel")

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return zeros for h, (B, D) and at least in float32, and the number of its document, (B,)."""
        if self.role != "causal":
            return None
        h_BD = like.new_zeros(batch_size, self.dim, dtype=torch.promote_types(like.dtype, torch.float32))
        return State(h=h_BD, segment=like.new_ones(batch_size, dtype=torch.long))

    def mixing_flops(self, length: int) -> float:
        """Two products and a sum for each channel."""
        return 3.0 * self.dim


def recur(gate_BTD: Tensor, candidate_BTD: Tensor, segments_BT: Tensor | None, state: State | None = None) -> Tensor:
    """Return h at each position, (B, T, D) and at least in float32; padding repeats the last one.

    Args:
        gate_BTD: gates before the sigmoid.
        candidate_BTD: candidates.
        segments_BT: h starts from zero with each document; None: one document.
        state: when decoding, h and the document of the last real column; it is updated.
    """
    keep_BTD, new_BTD = gates(gate_BTD, segments_BT, None if state is None else state["segment"])
    new_BTD = new_BTD * candidate_BTD
    if state is not None:
        # The state enters through the first column.
        first_B1D = new_BTD[:, :1] + keep_BTD[:, :1] * state["h"][:, None]
        new_BTD = torch.cat([first_B1D, new_BTD[:, 1:]], 1)
    h_BTD: Tensor = Scan.apply(keep_BTD, new_BTD)  # type: ignore[no-untyped-call]
    if state is not None:
        state["h"] = h_BTD[:, -1]
        if segments_BT is not None:
            state["segment"] = torch.maximum(state["segment"], segments_BT.amax(1))
        state.length += h_BTD.shape[1]
    return h_BTD


def gates(gate_BTD: Tensor, segments_BT: Tensor | None, before_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return how much of h is kept and how much of the candidate comes in, (B, T, D) each and at least in float32.

    Args:
        gate_BTD: gates before the sigmoid.
        segments_BT: nothing is kept where a document begins, and all of it at padding; None: one document.
        before_B: the document of the last real column before the first one; None: there was none.
    """
    # Not 1 - z: a gate that is nearly shut would be rounded away.
    exact = torch.promote_types(gate_BTD.dtype, torch.float32)
    keep_BTD, new_BTD = (-gate_BTD.to(exact)).sigmoid(), gate_BTD.to(exact).sigmoid()
    if segments_BT is not None:
        before_B = torch.zeros_like(segments_BT[:, 0]) if before_B is None else before_B
        running_BT = torch.cat([before_B[:, None], segments_BT], 1).cummax(1).values
        keep_BTD = keep_BTD.masked_fill((segments_BT > running_BT[:, :-1])[..., None], 0.0)
        padding_BT1 = (segments_BT == 0)[..., None]
        keep_BTD, new_BTD = keep_BTD.masked_fill(padding_BT1, 1.0), new_BTD.masked_fill(padding_BT1, 0.0)
    return keep_BTD, new_BTD


def unrolled(keep_BTC: Tensor, new_BTC: Tensor) -> Tensor:
    """Return the matrix of each channel's recurrence, (B, C, T, T): h = matrix @ candidates."""
    B, T, C = keep_BTC.shape
    rows = [keep_BTC.new_zeros(B, C, T)]
    for t in range(T):
        row_BCT = rows[-1] * keep_BTC[:, t, :, None]
        row_BCT[..., t] = new_BTC[:, t]
        rows.append(row_BCT)
    return torch.stack(rows[1:], 2)


class Scan(torch.autograd.Function):
    """h[t] = keep[t] * h[t - 1] + new[t] for all t at once; only ``keep`` and h are saved for the gradient."""

    @staticmethod
    def forward(ctx: Any, keep_BTD: Tensor, new_BTD: Tensor) -> Tensor:
        """Return h, (B, T, D)."""
        h_BTD = doubling(keep_BTD, new_BTD)
        ctx.save_for_backward(keep_BTD, h_BTD)
        return h_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients. That of h[t] is a recurrence from the end: G[t] = grad[t] + keep[t + 1] G[t + 1]."""
        keep_BTD, h_BTD = ctx.saved_tensors
        next_BTD, previous_BTD = F.pad(keep_BTD[:, 1:], (0, 0, 0, 1)), F.pad(h_BTD[:, :-1], (0, 0, 1, 0))
        new_BTD = doubling(next_BTD.flip(1), grad_BTD.flip(1)).flip(1)
        return new_BTD * previous_BTD, new_BTD  # d keep[t] = G[t] h[t - 1], d new[t] = G[t]


def doubling(keep_BTD: Tensor, new_BTD: Tensor) -> Tensor:
    """Return h of the recurrence in log2(T) steps (Hillis and Steele 1986, doi:10.1145/7902.7903).

    Before each step h counts the last ``step`` positions, and keep[t] is the factor from the h before them to h[t].
    With keep = 1 everywhere these are sums:  a b c d  ->  a, ab, bc, cd  ->  a, ab, abc, abcd.
    """
    step = 1
    while step < keep_BTD.shape[1]:
        later_BTD = new_BTD[:, step:] + keep_BTD[:, step:] * new_BTD[:, :-step]
        new_BTD = torch.cat([new_BTD[:, :step], later_BTD], 1)
        keep_BTD = torch.cat([keep_BTD[:, :step], keep_BTD[:, step:] * keep_BTD[:, :-step]], 1)
        step *= 2
    return new_BTD
