"""Position encodings: how a network knows the order of its inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmkit.contracts import Position
from llmkit.errors import UserError
from llmkit.ops.elementwise import rotate
from llmkit.sequence import Sequence


class Sinusoidal(Position):
    """Fixed sine and cosine waves added to the embeddings; any length.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
    """

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add the waves: sine in even channels, cosine in odd ones."""
        angles = _angles(positions_BT, self.dim, 10000.0)
        waves_BTD = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : self.dim]
        # Small initial embeddings would drown in the waves: section 3.4 scales them up.
        return x_BTD * math.sqrt(self.dim) + waves_BTD.to(x_BTD.dtype)


class Learned(Position):
    """One learned vector per position added to the embeddings; no longer than the context.

    Devlin et al. 2018, arXiv:1810.04805; Radford et al. 2019 (GPT-2).

    Args:
        dim: model width.
        max_length: the context: how many positions have a vector.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.table = nn.Embedding(max_length, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add each position's vector. Raises UserError for positions outside the context."""
        # Only the CPU reports a bad index as an exception; the width shows it without waiting for the device.
        if positions_BT.shape[-1] <= self.max_length:
            try:
                vectors_BTD: Tensor = self.table(positions_BT)
                return x_BTD + vectors_BTD
            except IndexError:
                pass
        longest = max(positions_BT.shape[-1], int(positions_BT.max()) + 1)
        raise UserError(f"learned positions end at context {self.max_length}, got {longest} positions")


class Rotary(Position):
    """Queries and keys turned by their position, so that scores depend on distance (RoPE); any length.

    Su et al. 2021, arXiv:2104.09864. Channel i of a head is turned together with channel i + E / 2.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
        base: the slowest channel turns once in about ``2 pi base`` positions.
    """

    def __init__(self, dim: int, max_length: int, base: float = 10000.0) -> None:
        super().__init__(dim, max_length)
        self.base = base

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        """Turn queries or keys. Raises UserError when the width of a head is odd."""
        width = x_BHTE.shape[-1]
        if width % 2:
            raise UserError(f"rotary positions need an even width of each head, got {width}")
        if ("rotary", width) not in seq.memo:
            compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            tables = _compiled_tables if compiled else _tables
            seq.memo["rotary", width] = tables(seq.positions_BT, width, self.base).unbind()
        cos, sin = seq.memo["rotary", width]
        return rotate(x_BHTE, cos, sin)


class Alibi(Position):
    """A penalty on the scores that grows with distance, at another rate for each head; any length.

    Press et al. 2021, arXiv:2108.12409; symmetric in distance where a network looks both ways.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
    """

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return minus slope times distance, (B or 1, H, T, S), in float32."""
        distance_B1TS = (query_BT[:, None, :, None] - key_BS[:, None, None, :]).abs()
        return distance_B1TS * -slopes(num_heads, query_BT.device)[:, None, None]


class NoPosition(Position):
    """No position encoding: a causal network can still infer the order from how much it sees.

    Haviv et al. 2022, arXiv:2203.16634.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
    """


def slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ALiBi's slopes, (H,), in float32: a geometric sequence from 2 ** (-8 / n) on when n is a power of two.

    For other numbers: the slopes of the power of two below, then every other slope of the power of two above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    steps = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (8 / power)
    between = torch.arange(num_heads - power, device=device, dtype=torch.float32) * (8 / power) + 4 / power
    return torch.cat([steps, between]).neg().exp2()


def _tables(positions_BT: Tensor, width: int, base: float) -> Tensor:
    """Return what ``rotate`` multiplies with, cosines and sines, (2, B, 1, T, E).

    They are in float32 whatever the model's dtype: bfloat16 cannot distinguish large angles.
    """
    angles_B1TE = _angles(positions_BT, width, base)[:, None]
    cos, sin = angles_B1TE.cos(), angles_B1TE.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


# An operation that torch.compile does not look into. Otherwise it would compute powers and cosines again in the kernel
# of each layer, for each head, forwards and backwards.
_compiled_tables = torch.library.custom_op("llmkit::rotary_tables", _tables, mutates_args=())


@_compiled_tables.register_fake
def _(positions_BT: Tensor, width: int, base: float) -> Tensor:
    return positions_BT.new_empty(2, len(positions_BT), 1, positions_BT.shape[1], width, dtype=torch.float32)


def _angles(positions_BT: Tensor, width: int, base: float) -> Tensor:
    """Return position * base ** (-2 i / width) for each pair i of channels, (B, T, ceil(width / 2)), float32."""
    pairs = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32)
    return positions_BT[..., None] * base ** (-pairs / width)
