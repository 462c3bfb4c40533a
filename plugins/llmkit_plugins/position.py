"""Position encodings: how a network knows the order of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmkit.contracts import Position, Role
from llmkit.errors import UserError, unknown
from llmkit.ops.elementwise import rotate
from llmkit.sequence import Sequence


class Sinusoidal(Position):
    """Fixed sine and cosine waves added to the embeddings; any length.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
        layout: ``interleaved``: sines in even channels, cosines in odd ones; ``halves``: sines in the first half,
            cosines in the second (Marian: Junczys-Dowmunt et al. 2018, arXiv:1804.00344).
        scale: whether the embeddings are multiplied by the root of the width.
    """

    def __init__(
        self, dim: int, max_length: int, layout: Literal["interleaved", "halves"] = "interleaved", scale: bool = True
    ) -> None:
        super().__init__(dim, max_length)
        self.layout, self.scale = layout, scale

    def add(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add the waves."""
        if self.layout == "interleaved":
            angles = _angles(positions_BT, self.dim, 10000.0)
            waves_BTD = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : self.dim]
        else:  # as Marian's tables, which are computed in double precision; MPS has none
            double = torch.float32 if positions_BT.device.type == "mps" else torch.float64
            angles = _angles(positions_BT, self.dim, 10000.0, double)
            waves_BTD = torch.cat([angles.sin(), angles.cos()], dim=-1)[..., : self.dim]
        # Small initial embeddings would drown in the waves: section 3.4 scales them up.
        return (x_BTD * math.sqrt(self.dim) if self.scale else x_BTD) + waves_BTD.to(x_BTD.dtype)


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
        scaling: how a model was stretched to longer texts, in the words of Hugging Face: a mapping with ``rope_type``
            ``linear`` (Chen et al. 2023, arXiv:2306.15595), ``llama3`` (arXiv:2407.21783) or ``yarn`` (Peng et al.
            2023, arXiv:2309.00071), ``factor``, and for the latter two ``original_max_position_embeddings``; further
            ``low_freq_factor`` and ``high_freq_factor`` of llama3, ``beta_fast``, ``beta_slow`` and
            ``attention_factor`` of yarn.

    Raises:
        UserError: an unknown scaling, or one that lacks a number.
    """

    def __init__(self, dim: int, max_length: int, base: float = 10000.0, scaling: dict[str, Any] | None = None) -> None:
        super().__init__(dim, max_length)
        self.base, self.scaling = base, check_scaling(scaling)

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        """Turn queries or keys. Raises UserError when the width of a head is odd."""
        width = x_BHTE.shape[-1]
        if width % 2:
            raise UserError(f"rotary positions need an even width of each head, got {width}")
        if ("rotary", width) not in seq.memo:
            compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            tables = _compiled_tables if compiled else _tables
            frequencies, factor = self._frequencies(width, seq.positions_BT.device)
            seq.memo["rotary", width] = tables(seq.positions_BT, frequencies, factor).unbind()
        cos, sin = seq.memo["rotary", width]
        return rotate(x_BHTE, cos, sin)

    def _frequencies(self, width: int, device: torch.device) -> tuple[Tensor, float]:
        """Return how far each pair of channels turns in one position, (width / 2,), and a factor of the tables."""
        plain = _frequencies(width, self.base, device)
        return (plain, 1.0) if self.scaling is None else _scaled(plain, self.base, self.scaling)


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


class Relative(Position):
    """A learned number for each head and range of distances, added to the scores (T5); any length.

    Raffel et al. 2020, arXiv:1910.10683, section 2.1. Half of the ranges hold a single distance, from 0; the others
    grow with the distance up to ``max_distance``, and the last one holds all that is further away. Where a network
    looks both ways, half of all ranges are for what comes later. All layers of a stack share the numbers; each side of
    an encoder-decoder has its own.

    Args:
        dim: model width.
        max_length: the context; not a limit here.
        role: that of the stack's attention.
        bias_heads: number of heads of the attention; 0: it has no scores that a bias could be added to.
        buckets: number of ranges.
        max_distance: where the last range begins.

    Raises:
        UserError: too few buckets, or a distance that they reach one by one.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        role: Role = "causal",
        bias_heads: int = 4,
        buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__(dim, max_length)
        self.both_ways, self.buckets, self.max_distance = role != "causal", buckets, max_distance
        self.ranges = buckets // 2 if self.both_ways else buckets
        self.single = self.ranges // 2
        if self.single < 1:
            raise UserError(f"buckets must be at least {4 if self.both_ways else 2}, got {buckets}")
        if max_distance <= self.single:
            raise UserError(f"max_distance must be above {self.single} with {buckets} buckets, got {max_distance}")
        self.table = nn.Embedding(buckets, bias_heads) if bias_heads else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.02)

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        """Return the number of each head and distance, (B or 1, H, T, S). Raises UserError for other heads."""
        if self.table is None or num_heads != self.table.embedding_dim:
            built = 0 if self.table is None else self.table.embedding_dim
            raise UserError(f"relative positions were built for {built} heads, got {num_heads}")
        bias_BTSH: Tensor = self.table(self.bucket(key_BS[:, None, :] - query_BT[:, :, None]))
        return bias_BTSH.permute(0, 3, 1, 2)

    def bucket(self, offset: Tensor) -> Tensor:
        """Return the range of each offset of a key from its query, in the same shape."""
        far = offset.abs() if self.both_ways else offset.neg().clamp(min=0)
        grown = (far.clamp(min=self.single).float() / self.single).log() / math.log(self.max_distance / self.single)
        coarse = self.single + (grown * (self.ranges - self.single)).long()
        found = torch.where(far < self.single, far, coarse.clamp(max=self.ranges - 1))
        return found + (offset > 0) * self.ranges if self.both_ways else found


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


def _tables(positions_BT: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Return what ``rotate`` multiplies with, cosines and sines, (2, B, 1, T, E).

    They are in float32 whatever the model's dtype: bfloat16 cannot distinguish large angles.
    """
    angles_B1TE = (positions_BT[..., None] * frequencies)[:, None]
    cos, sin = angles_B1TE.cos(), angles_B1TE.sin()
    tables = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    return tables if factor == 1.0 else tables * factor


# An operation that torch.compile does not look into. Otherwise it would compute powers and cosines again in the kernel
# of each layer, for each head, forwards and backwards.
_compiled_tables = torch.library.custom_op("llmkit::rotary_tables", _tables, mutates_args=())


@_compiled_tables.register_fake
def _(positions_BT: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    shape = 2, len(positions_BT), 1, positions_BT.shape[1], 2 * len(frequencies)
    return positions_BT.new_empty(shape, dtype=torch.float32)


def _angles(positions_BT: Tensor, width: int, base: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return position * base ** (-2 i / width) for each pair i of channels, (B, T, ceil(width / 2))."""
    return positions_BT[..., None] * _frequencies(width, base, positions_BT.device, dtype)


def _frequencies(width: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    pairs = torch.arange(0, width, 2, device=device, dtype=dtype)
    return base ** (-pairs / width)


SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The numbers that each kind of scaling needs."""
OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor")}


def check_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a scaling of rotary positions as a plain mapping.

    Raises UserError for an unknown kind, and a number that is missing, unknown or not above zero.
    """
    if scaling is None:
        return None
    kind = str(scaling.get("rope_type"))
    if kind not in SCALINGS:
        raise UserError(f"scaling: {unknown('rope_type', kind, SCALINGS)}")
    numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
    if missing := [name for name in SCALINGS[kind] if name not in numbers]:
        raise UserError(f"scaling: {kind} needs {', '.join(missing)}")
    allowed = SCALINGS[kind] + OPTIONAL.get(kind, ())
    for name, value in numbers.items():
        if name not in allowed:
            raise UserError(f"scaling: {unknown('number', name, allowed)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"scaling: {name} must be a number above 0, got {value!r}")
    return dict(scaling)


def _scaled(plain: Tensor, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Return scaled frequencies, and what cosines and sines are multiplied by."""
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":  # slow channels are slowed down further, fast ones are not, and between them it is gradual
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * plain / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    width = 2 * len(plain)

    def channel(turns: float) -> float:
        """Return which pair of channels turns this many times within the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(channel(scaling.get("beta_slow", 1))), width - 1)
    pairs = torch.arange(len(plain), device=plain.device, dtype=torch.float32)
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    sharper = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain * (1 - slowed) + plain / factor * slowed, scaling.get("attention_factor", sharper)
