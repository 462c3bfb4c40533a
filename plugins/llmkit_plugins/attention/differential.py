"""Softmax attention that subtracts one map from another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Role
from llmkit.errors import UserError
from llmkit.sequence import Sequence
from llmkit_plugins.attention.softmax import GroupedQuery, Kept, nearest


class Differential(GroupedQuery):
    """Each head subtracts a second softmax map from the first, which cancels what both give to the irrelevant.

    Ye et al. 2024, arXiv:2410.05258. A head has two queries and two keys of E channels and values of 2 E, so that the
    weights are as many as those of ``multi_head``. The paper takes half as many heads as it would otherwise.

    Args:
        dim: model width; must be divisible by twice ``num_heads``.
        role: ``causal``, ``bidirectional`` or ``cross``.
        num_heads: number of heads, each with two maps.
        lambda_init: the share of the second map that is subtracted at first, and what the outputs are scaled down by:
            ``1 - lambda_init``. At least 0 and below 1.
        qk_norm: whether each map's queries and keys are normalised (arXiv:2010.04245).
        bias: whether the projections have biases.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        UserError: when twice the heads do not divide the width, or ``lambda_init`` is not a share below one.
    """

    def __init__(
        self,
        dim: int,
        role: Role,
        num_heads: int = 4,
        lambda_init: float = 0.8,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if num_heads >= 1 and dim % (2 * num_heads):
            raise UserError(
                f"dim {dim} is not divisible by twice num_heads {num_heads} (two maps a head); "
                f"nearest widths: {nearest(dim, 2 * num_heads)}"
            )
        if not 0 <= lambda_init < 1:
            raise UserError(f"lambda_init must be at least 0 and below 1, got {lambda_init}")
        super().__init__(dim, role, 2 * num_heads, 2 * num_heads, qk_norm, bias, dropout)
        self.bias_heads = num_heads  # one bias for both maps of a head
        self.lambda_init = lambda_init
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(self.head_dim).normal_(std=0.1)) for _ in range(4)
        )
        self.head_scale = nn.Parameter(torch.ones(2 * self.head_dim))

    def mixing_flops(self, length: int) -> float:
        """Two maps of E channels with sums of 2 E values: 6 * length * dim; half of it when causal."""
        return 1.5 * super().mixing_flops(length)

    def _project(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, Kept]:
        q_BHTE, kept = super()._project(x_BTD, seq)
        return q_BHTE, self._paired(kept)

    def _keep(self, x_BSD: Tensor) -> Kept:
        return self._paired(super()._keep(x_BSD))

    def _paired(self, kept: Kept) -> Kept:
        """Join the values of neighbours: half as many heads, twice as wide."""
        return {"k": kept["k"], "v": kept["v"].unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)}

    def _room(self, columns: int) -> dict[str, tuple[int, ...]]:
        return {**super()._room(columns), "v": (self.bias_heads, columns, 2 * self.head_dim)}

    def _attend(self, q_BHTE: Tensor, kept: Kept, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        first, second = (
            self._map(q, k, kept["v"], mask, is_causal)
            for q, k in zip(q_BHTE.chunk(2, 1), kept["k"].chunk(2, 1), strict=True)
        )
        share = torch.dot(self.lambda_q1, self.lambda_k1).exp() - torch.dot(self.lambda_q2, self.lambda_k2).exp()
        y_BHTE = first - (share + self.lambda_init).to(first.dtype) * second
        scale = (1 - self.lambda_init) * self.head_scale
        return F.rms_norm(y_BHTE, (2 * self.head_dim,), scale.to(y_BHTE.dtype), eps=1e-6)

    def _map(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return what one of the two maps makes of the values."""
        if q.shape[2] > 1:
            # Keys as wide as values take the kernels that never hold all scores; a single query has few.
            q, k = (F.pad(x, (0, self.head_dim)) for x in (q, k))
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
