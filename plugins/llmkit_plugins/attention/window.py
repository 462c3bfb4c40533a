"""Softmax attention to what is near.

Here K is the number of key/value heads, M the number of blocks and W the window.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Sequence, State
from llmkit_plugins.attention.softmax import GroupedQuery, Kept


class SlidingWindow(GroupedQuery):
    """Each position sees only the nearest ones, so that cost grows with the length, not with its square.

    Beltagy et al. 2020, arXiv:2004.05150; Child et al. 2019, arXiv:1904.10509. The window counts real positions of
    the position's own document. Rows without padding that are well longer than the window are computed block by
    block, others under a mask. The decoding cache has room for one window, however long the text gets.

    Args:
        dim: model width; must be divisible by ``num_heads``.
        role: ``causal`` or ``bidirectional``.
        window: how many positions are seen, the position itself included; when bidirectional, ``window - 1`` on each
            side and the position itself.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; must divide ``num_heads``. None: as many as there are query heads.
        qk_norm: whether each head's queries and keys are normalised (arXiv:2010.04245).
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when the window is empty, or the heads do not divide the width or each other.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})
    grows: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        role: Role,
        window: int = 64,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if window < 1:
            raise UserError(f"window must be at least 1 (the position itself), got {window}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(dim, role, num_heads, num_kv_heads, qk_norm, bias, dropout)
        self.window = window

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of the last real positions, (B, K, W, E).

        With room for a whole window there is no limit on the length; a shorter ``max_length`` is one.
        """
        columns = min(self.window, max_length)
        state = super().init_state(batch_size, columns, like)
        if state is not None:
            for name in ("segments", "positions"):
                state[name] = torch.zeros(batch_size, columns, dtype=torch.long, device=like.device)
        return state

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * seen * dim, with the average number of positions that are seen."""
        near = min(length, self.window)
        side = near - near * near / (2 * length)  # shorter at the beginning of the row
        return 4.0 * self.dim * side * (1 if self.role == "causal" else 2)

    def _self(self, x_BTD: Tensor, seq: Sequence, state: State | None) -> Tensor:
        q_BHTE, new = self._project(x_BTD, seq)
        if state is None:
            return self._own(q_BHTE, new, seq)
        room, end = state["positions"].shape[1], state.length + x_BTD.shape[1]
        if room < self.window and end > room:
            raise ValueError(f"the decoding state has room for {room} columns, got {end}")
        kept = {name: torch.cat([state[name], value.to(state[name].dtype)], 2) for name, value in new.items()}
        key = self._columns(state, seq)
        if state.length == 0:
            y_BHTE = self._own(q_BHTE, new, seq)
        else:
            y_BHTE = self._attend(q_BHTE, kept, self._mask(seq, key, q_BHTE.dtype))
        self._trim(state, kept, key)
        state.length = end
        return y_BHTE

    def _columns(self, state: State, seq: Sequence) -> Sequence:
        """Return the cached columns followed by the new ones; free places count as padding."""
        shape = (len(state["positions"]), seq.positions_BT.shape[1])
        segments = torch.ones_like(seq.positions_BT) if seq.segments_BT is None else seq.segments_BT
        return Sequence(
            torch.cat([state["positions"], seq.positions_BT.expand(shape)], 1),
            torch.cat([state["segments"], segments.expand(shape)], 1),
        )

    def _trim(self, state: State, kept: Kept, key: Sequence) -> None:
        """Leave the last real columns of each row in the cache, as many as it has room for."""
        assert key.segments_BT is not None
        # The sort moves padding to the front and leaves the order of the rest.
        real_BS = (key.segments_BT > 0).long()
        last_BW = real_BS.argsort(dim=1, stable=True)[:, -state["positions"].shape[1] :]
        rows_B1 = torch.arange(len(last_BW), device=last_BW.device)[:, None]
        for name, value_BKSE in kept.items():
            state[name] = value_BKSE.transpose(1, 2)[rows_B1, last_BW].transpose(1, 2)  # copies whole columns
        state["positions"], state["segments"] = key.positions_BT[rows_B1, last_BW], key.segments_BT[rows_B1, last_BW]

    def _own(self, q_BHTE: Tensor, kept: Kept, seq: Sequence) -> Tensor:
        dense = seq.segments_BT is None and len(seq.positions_BT) == 1
        if dense and q_BHTE.shape[2] > 3 * self.window:  # shorter rows are as cheap under a mask
            return self._blocks(q_BHTE, kept, seq)
        return super()._own(q_BHTE, kept, seq)

    def _own_mask(self, seq: Sequence, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
        if seq.positions_BT.shape[1] <= self.window:
            return super()._own_mask(seq, dtype)  # all of the row is near
        memo_key = ("window", self.window, self.bias_heads, self.role, dtype)
        if memo_key not in seq.memo:
            seq.memo[memo_key] = self._mask(seq, seq, dtype)
        return seq.memo[memo_key], False

    def _visible(self, seq: Sequence, key: Sequence) -> Tensor | None:
        near = (seq.positions_BT[:, None, :, None] - key.positions_BT[:, None, None, :]).abs() < self.window
        mask = super()._visible(seq, key)
        return near if mask is None else near & mask

    def _blocks(self, q_BHTE: Tensor, kept: Kept, seq: Sequence) -> Tensor:
        """Let blocks of one window look at themselves and the block before; when bidirectional, at the next one too."""
        W = self.window
        batch, _, length, _ = q_BHTE.shape
        rest, after = -length % W, 0 if self.role == "causal" else W
        mask = self._block_mask(seq, length + rest, after, q_BHTE.dtype)
        if mask.shape[1] > 1:
            mask = mask.repeat(1, batch, 1, 1)
        # Blocks take the place of the batch, which joins the heads: so one mask serves all rows.
        q = F.pad(q_BHTE, (0, 0, 0, rest)).unflatten(2, (-1, W)).permute(2, 0, 1, 3, 4).flatten(1, 2)
        around = {}
        for name, value_BKTE in kept.items():
            blocks_BKMES = F.pad(value_BKTE, (0, 0, W, rest + after)).unfold(2, 2 * W + after, W)
            around[name] = blocks_BKMES.permute(2, 0, 1, 4, 3).flatten(1, 2)
        y = self._attend(q, around, mask).unflatten(1, (batch, -1))
        y_BHTE: Tensor = y.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        return y_BHTE

    def _block_mask(self, seq: Sequence, end: int, after: int, dtype: torch.dtype) -> Tensor:
        """Return the mask of each block, (M, 1, W, S), or with a position bias what is added, (M, H, W, S)."""
        memo_key = ("window blocks", self.window, self.bias_heads, self.role, dtype)
        if memo_key not in seq.memo:
            W, positions_T = self.window, seq.positions_BT[0]
            last = len(positions_T) - 1
            columns = torch.arange(-W, end + after, device=positions_T.device)
            query_MW = columns[W : W + end].view(-1, W)
            key_MS = columns.unfold(0, 2 * W + after, W)
            query, key = query_MW[:, None, :, None], key_MS[:, None, None, :]
            mask = ((query - key).abs() < W) & (key >= 0)
            # Columns after the last one see each other: a query without any key would be NaN.
            mask &= (query >= key) if self.role == "causal" else (key <= last) | (query > last)
            blocks = Sequence(positions_T[query_MW.clamp(max=last)], position=seq.position)
            bias = blocks.bias(Sequence(positions_T[key_MS.clamp(0, last)]), self.bias_heads)
            seq.memo[memo_key] = mask if bias is None else bias.to(dtype).masked_fill(~mask, float("-inf"))
        found: Tensor = seq.memo[memo_key]
        return found
