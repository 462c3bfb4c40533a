"""Token mixing by a matrix of low rank: every position writes to a few slots and reads a mixture of them.

Here K is the number of slots (the rank), S the positions that write and M the number of documents of a memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Attention, Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Mixing, Sequence, State
from llmkit_plugins.attention.cache import from_memory
from llmkit_plugins.attention.chunked import Chunks, document_sums, empty_state, flops, pairs, read_documents


class LowRank(Attention):
    """Tokens are mixed by a matrix of low rank: each writes to a few slots and reads a mixture of their means.

    The mixing matrix is L R: a softmax over the slots at each position (L, T x K), and over the positions the share
    that each has in what was written to a slot (R, K x S). Its rows are weights that sum to one, its rank is at most
    ``rank``. A causal one takes the shares of what was written so far. Peng et al. 2021, arXiv:2110.02488, write to
    slots, but read them by softmax attention; Wang et al. 2020, arXiv:2006.04768, find attention to be of low rank.
    The decoding state is the slots. Rotary positions and ALiBi change nothing here.

    Args:
        dim: model width.
        role: ``causal``, ``bidirectional`` or ``cross``.
        rank: number of slots.

    Raises:
        UserError: when ``rank`` is below one.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional", "cross"})

    def __init__(self, dim: int, role: Role, rank: int = 32) -> None:
        super().__init__(dim, role)
        if rank < 1:
            raise UserError(f"rank must be at least 1, got {rank}")
        self.rank = rank
        self.read, self.write = nn.Linear(dim, rank), nn.Linear(dim, rank)
        self.value, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``.

        Raises:
            ValueError: when a cross-attention gets no memory.
        """
        read_B1TK = self.read(x_BTD).softmax(-1)[:, None]
        if self.role == "cross":
            slots_BM1KD = from_memory(seq, memory, state, self._read)["slots"]
            y_B1TD = read_documents(read_B1TK, slots_BM1KD, seq)
        else:
            write_B1TK, value_B1TD = self._written(x_BTD)
            chunks = Chunks(seq, causal=self.role == "causal", state=state)
            one_B1T1 = torch.ones_like(write_B1TK[..., :1])
            total_B1TK = chunks.mix(one_B1T1, one_B1T1, write_B1TK, "totals")
            y_B1TD = chunks.mix(read_B1TK / total_B1TK, write_B1TK, value_B1TD, "slots")
        y: Tensor = self.out(y_B1TD[:, 0].to(x_BTD.dtype))
        return y

    def mixing(self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None) -> Mixing | None:
        """Return the mixing matrix L R, whose rows sum to one."""
        read_B1TK = self.read(x_BTD).softmax(-1)[:, None]
        write_B1SK, value_B1SD = self._written(x_BTD if memory is None else memory.x_BSD)
        if memory is None:
            seen = pairs(seq, causal=self.role == "causal").to(write_B1SK.dtype)
        else:
            mask = seq.mask(memory.seq, causal=False)
            T, S = read_B1TK.shape[2], write_B1SK.shape[2]
            seen = write_B1SK.new_ones(1, 1, T, S) if mask is None else mask.to(write_B1SK.dtype)
        total_B1TK = (seen @ write_B1SK).clamp(min=1e-4)
        weights_B1TS = (read_B1TK / total_B1TK) @ write_B1SK.mT * seen
        return Mixing(value_B1SD, weights_B1TS, lambda y_B1TD: self.out(y_B1TD[:, 0]))

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return empty slots, (B, 1, K, D), and their totals; a ``cross`` state is filled at the first call."""
        if self.role == "bidirectional":
            return None
        if self.role == "cross":
            return State()
        return empty_state(like, batch_size, totals=(1, 1, self.rank), slots=(1, self.rank, self.dim))

    def mixing_flops(self, length: int) -> float:
        """Pairs of columns within a chunk, and the slots written and read; the same for their totals."""
        slots = flops(self.role, length, self.rank, self.dim, 1)
        return slots + flops(self.role, length, 1, self.rank, 1)

    def _written(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each position writes to each slot, (B, 1, T, K), and what, (B, 1, T, D)."""
        # Never so little that a slot's total would be zero, not even in half precision.
        write_BTK = self.write(x_BTD).sigmoid() + 1e-4
        return write_BTK[:, None], self.value(x_BTD)[:, None]

    def _read(self, memory: Memory) -> dict[str, Tensor]:
        """Return the slots of each document of a memory, (B, M, 1, K, D)."""
        write_B1SK, value_B1SD = self._written(memory.x_BSD)
        sums_BM1KF = document_sums(write_B1SK, F.pad(value_B1SD, (0, 1), value=1.0), memory.seq)
        return {"slots": sums_BM1KF[..., :-1] / sums_BM1KF[..., -1:].clamp(min=1e-4)}  # nothing written: zero, not NaN
