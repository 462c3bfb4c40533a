"""Softmax attention to what is near.

Here K is the number of key/value heads, M the number of blocks and W the window.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Memory, Sequence, State
from llmkit_plugins.attention.cache import Cache, Lookup, segments_or_ones
from llmkit_plugins.attention.heads import join, split
from llmkit_plugins.attention.softmax import GroupedQuery


class SlidingWindow(GroupedQuery):
    """Each position sees only the nearest ones, so that cost grows with the length, not with its square.

    Beltagy et al. 2020, arXiv:2004.05150; Child et al. 2019, arXiv:1904.10509. The window counts real positions of
    the position's own document. Rows without padding that are much longer than the window are computed block by
    block, others under a mask. The decoding cache has room for one window, however long the text gets.

    Args:
        dim: model width; must be divisible by ``num_heads`` unless ``head_dim`` is given.
        role: ``causal`` or ``bidirectional``.
        window: how many positions are seen, the position itself included; when bidirectional, ``window - 1`` on each
            side and the position itself.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; must divide ``num_heads``. None: as many as there are query heads.
        qk_norm: whether each head's queries and keys are normalised (arXiv:2010.04245); ``separate``: with a scale for
            queries and another for keys.
        bias: whether the projections have biases; ``qkv``: all but the output projection.
        dropout: probability that an attention weight is dropped in training.
        head_dim: width of a head; None: ``dim / num_heads``.

    Raises:
        UserError: when the window is empty, or the heads do not divide the width or each other.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"causal", "bidirectional"})

    def __init__(
        self,
        dim: int,
        role: Role,
        window: int = 64,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        qk_norm: bool | Literal["separate"] = True,
        bias: bool | Literal["qkv"] = False,
        dropout: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        if window < 1:
            raise UserError(f"window must be at least 1 (the position itself), got {window}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(dim, role, num_heads, num_kv_heads, qk_norm, bias, dropout, head_dim)
        self.window = window
        self.lookup = Lookup(role, num_heads, window)

    def forward(
        self, x_BTD: Tensor, seq: Sequence, *, memory: Memory | None = None, state: State | None = None
    ) -> Tensor:
        """Return the mixed sequence, (B, T, D); see ``Attention.forward``."""
        H, K = self.num_heads, self.num_kv_heads
        qk, v = split(self.qkv(x_BTD), H + 2 * K).split_with_sizes([H + K, K], 1)  # project: (B, H + K or K, T, E)
        q_BHTE, k = self.turn(qk, seq)  # rotate: (B, H or K, T, E)
        long = x_BTD.shape[1] > 3 * self.window  # shorter rows are as cheap under a mask
        first = state is None or state.length == 0
        if long and first and seq.segments_BT is None and len(seq.positions_BT) == 1:
            if state is not None:
                assert isinstance(state, WindowCache)
                state.extend(seq, {"k": k, "v": v}, biased=False)
            y_BHTE = self._blocks(q_BHTE, k, v, seq)
        else:
            (k, v), mask, is_causal = self.lookup(q_BHTE, seq, state, k=k, v=v)  # cache: (B, K, S, E) each
            y_BHTE = self.attend(q_BHTE, k, v, mask, is_causal)
        y: Tensor = self.out(join(y_BHTE))
        return y

    def init_state(self, batch_size: int, max_length: int, like: Tensor) -> State | None:
        """Return an empty cache of the last real positions, (B, K, W, E).

        With room for a whole window there is no limit on the length; a shorter ``max_length`` is one.
        """
        if self.role != "causal":
            return None
        column = (self.num_kv_heads, self.head_dim)
        return WindowCache(self.window, batch_size, max_length, like, k=column, v=column)

    def mixing_flops(self, length: int) -> float:
        """Scores and weighted sum: 4 * seen * H * E, with the average number of positions that are seen."""
        near = min(length, self.window)
        side = near - near * near / (2 * length)  # shorter at the beginning of the row
        return 4.0 * self.num_heads * self.head_dim * side * (1 if self.role == "causal" else 2)

    def _blocks(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, seq: Sequence) -> Tensor:
        """Let blocks of one window look at themselves and the block before; when bidirectional, at the next one too."""
        W = self.window
        batch, _, length, _ = q_BHTE.shape
        rest, after = -length % W, 0 if self.role == "causal" else W
        mask = self._block_mask(seq, length + rest, after, q_BHTE.dtype)
        if mask.shape[1] > 1:
            mask = mask.repeat(1, batch, 1, 1)
        # Blocks take the place of the batch, which joins the heads: so one mask serves all rows.
        q = F.pad(q_BHTE, (0, 0, 0, rest)).unflatten(2, (-1, W)).permute(2, 0, 1, 3, 4).flatten(1, 2)
        k, v = (
            F.pad(x_BKTE, (0, 0, W, rest + after)).unfold(2, 2 * W + after, W).permute(2, 0, 1, 4, 3).flatten(1, 2)
            for x_BKTE in (k_BKTE, v_BKTE)
        )
        y = self.attend(q, k, v, mask, is_causal=False).unflatten(1, (batch, -1))
        y_BHTE: Tensor = y.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        return y_BHTE

    def _block_mask(self, seq: Sequence, end: int, after: int, dtype: torch.dtype) -> Tensor:
        """Return the mask of each block, (M, 1, W, S), or with a position bias what is added, (M, H, W, S)."""
        memo_key = ("window blocks", self.window, self.num_heads, self.role, dtype)
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
            bias = blocks.bias(Sequence(positions_T[key_MS.clamp(0, last)]), self.num_heads)
            seq.memo[memo_key] = mask if bias is None else bias.to(dtype).masked_fill(~mask, float("-inf"))
        block_mask: Tensor = seq.memo[memo_key]
        return block_mask


class WindowCache(Cache):
    """The last real columns of each row. It never grows: places without a column yet count as padding.

    With a window of 3, the row "a b . c d" (the dot is padding) leaves "b c d" in it.

    Args:
        window: how many columns are looked at.
        batch_size: number of rows.
        max_length: a limit on the length where it is below the window.
        like: gives the dtype and the device.
        widths: as in ``Cache``.
    """

    grows: ClassVar[bool] = False

    def __init__(self, window: int, batch_size: int, max_length: int, like: Tensor, **widths: tuple[int, ...]) -> None:
        super().__init__(batch_size, min(window, max_length), like, **widths)
        self.limited = max_length < window
        for name in ("segments", "positions"):
            self[name] = torch.zeros(batch_size, self.capacity, dtype=torch.long, device=like.device)

    def settle(self) -> None:
        """Leave the count of columns to the caller: all the room is taken already."""
        self.limited = False

    def extend(self, seq: Sequence, new: dict[str, Tensor], biased: bool) -> tuple[tuple[Tensor, ...], Sequence | None]:
        """Append the columns of ``seq``; return those that may be near, and their positions and segments."""
        end = self.length + seq.positions_BT.shape[1]
        if self.limited and end > self.capacity:
            raise ValueError(f"the decoding state has room for {self.capacity} columns, got {end}")
        columns = {name: torch.cat([self[name], value.to(self[name].dtype)], -2) for name, value in new.items()}
        self._append("positions", seq.positions_BT)
        self._append("segments", segments_or_ones(seq))
        key = Sequence(self["positions"], self["segments"])

        # The sort moves padding to the front and leaves the order of the rest.
        last_BW = (self["segments"] > 0).long().argsort(dim=1, stable=True)[:, -self.capacity :]
        rows_B1 = torch.arange(len(last_BW), device=last_BW.device)[:, None]
        for name, value_BKSE in columns.items():
            self[name] = value_BKSE.transpose(1, 2)[rows_B1, last_BW].transpose(1, 2)  # copies whole columns
        self["positions"], self["segments"] = self["positions"][rows_B1, last_BW], self["segments"][rows_B1, last_BW]
        self.length = end
        return tuple(columns.values()), key
