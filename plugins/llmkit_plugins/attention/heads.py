"""Channels split into heads and joined again, and the widths that fit."""

from __future__ import annotations

from torch import Tensor

from llmkit.contracts import Role
from llmkit.errors import UserError


def split(x_BTD: Tensor, num_heads: int) -> Tensor:
    """Return the channels of each head, (B, H, T, E)."""
    B, T, D = x_BTD.shape
    return x_BTD.view(B, T, num_heads, D // num_heads).transpose(1, 2)


def join(x_BHTE: Tensor) -> Tensor:
    """Return the heads side by side, (B, T, H * E)."""
    return x_BHTE.transpose(1, 2).flatten(2)


def check_heads(dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None) -> None:
    """Raise UserError when ``num_heads`` does not divide ``dim`` or ``num_kv_heads`` does not divide ``num_heads``.

    With a width of its own, ``head_dim``, a head need not be a part of the model width.
    """
    if head_dim is not None and head_dim < 1:
        raise UserError(f"head_dim must be at least 1, got {head_dim}")
    if num_heads < 1 or num_kv_heads < 1:
        raise UserError(f"num_heads and num_kv_heads must be at least 1, got {num_heads} and {num_kv_heads}")
    if head_dim is None and dim % num_heads:
        raise UserError(
            f"dim {dim} is not divisible by num_heads {num_heads}; nearest widths: {nearest(dim, num_heads)}"
        )
    if num_heads % num_kv_heads:
        allowed = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise UserError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}; allowed: {allowed}")


def check_dropout(dropout: float) -> None:
    """Raise UserError when ``dropout`` is not a probability below one."""
    if not 0 <= dropout < 1:
        raise UserError(f"attention dropout must be at least 0 and below 1, got {dropout}")


def check_directions(dim: int, role: Role) -> None:
    """Raise UserError when a bidirectional network cannot give half the width to each direction."""
    if role == "bidirectional" and dim % 2:
        raise UserError(f"dim {dim} must be even for two directions; nearest widths: {dim - 1}, {dim + 1}")


def nearest(dim: int, step: int) -> str:
    """Return the widths around ``dim`` that ``step`` divides, as a list to read."""
    below = dim // step * step
    return ", ".join(str(width) for width in (below, below + step) if width)
