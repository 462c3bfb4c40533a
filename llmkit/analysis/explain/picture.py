"""Explanations as pictures for a paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.analysis.explain.explanation import Explanation
from llmkit.analysis.explain.maps import Map
from llmkit.errors import UserError
from llmkit.run import drawing

LABELS = 48
"""Longest text whose tokens stand at the axes."""
PIXELS = 400
MOST = 64
"""Most pictures of a figure."""


def draw(one: Explanation, path: Path, layer: int | None = None, head: int | None = None) -> None:
    """Write the maps of an explanation as PNG and PDF: of cross-attention where there is some, else of all layers.

    Args:
        one: the explanation.
        path: the file.
        layer: this layer alone.
        head: this head alone.

    Raises UserError when there is no such layer or head.
    """
    part = "cross" if any(found.part == "cross" for found in one.maps) else "attention"
    chosen = [found for found in one.maps if found.part == part]
    layers = sorted({found.layer for found in chosen})
    if layer is not None and layer not in layers:
        raise UserError(f"explain: there is no layer {layer}; layers: {', '.join(map(str, layers))}")
    chosen = [found for found in chosen if layer is None or found.layer == layer]
    most = max(len(found.heads) for found in chosen)
    if head is not None and head >= most:
        raise UserError(f"explain: there is no head {head}; heads: 0 to {most - 1}")
    pictures = [
        (found, number) for found in chosen for number in range(len(found.heads)) if head is None or number == head
    ][:MOST]
    with drawing.style():
        drawing.save(_figure(one, pictures), path)


def _figure(one: Explanation, pictures: list[tuple[Map, int]]) -> Any:
    T = max(found.weights_HTS.shape[1] for found, _ in pictures)
    S = max(found.weights_HTS.shape[2] for found, _ in pictures)
    labelled = max(T, S) <= LABELS
    columns = min(len(pictures), 2 if labelled and max(T, S) > 12 else 4)
    rows = math.ceil(len(pictures) / columns)
    side = drawing.WIDTH / columns if len(pictures) > 1 else drawing.WIDTH * 0.7
    figure = drawing.canvas(side * columns, rows * (side * min(1.6, max(0.35, T / S)) + 0.35))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(pictures) :]:
        axis.remove()
    for axis, (found, number) in zip(axes, pictures, strict=False):
        weights_TS = _pooled(found.weights_HTS[number].float()).numpy()
        signed = bool((weights_TS < 0).any())
        largest = float(abs(weights_TS).max()) or 1.0
        limits: dict[str, Any] = {"vmin": -largest if signed else 0, "vmax": largest}
        height, width = found.weights_HTS.shape[1:]
        place = (-0.5, width - 0.5, height - 0.5, -0.5)
        axis.imshow(weights_TS, cmap="RdBu" if signed else "Blues", aspect="auto", extent=place, **limits)
        stack = f"{found.stack} " if len({other.stack for other, _ in pictures}) > 1 else ""
        title = f"{stack}layer {found.layer}, {found.heads[number]}"
        axis.set_title(title if len(title) < 24 else title.replace(", ", "\n", 1), fontsize=7)
        query, key = one.texts[found.query], one.texts[found.key]
        if labelled:
            asked = query.says if query.writes else query.tokens
            small = {"fontsize": max(3.5, min(7, 90 * side / 6.9 / max(T, S) * 1.8))}
            axis.set_yticks(range(weights_TS.shape[0]), [_label(token) for token in asked[: len(weights_TS)]], **small)
            axis.set_xticks(range(weights_TS.shape[1]), [_label(token) for token in key.tokens], rotation=90, **small)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(True)
    figure.supxlabel("read", fontsize=7)
    figure.supylabel("written" if one.texts[pictures[0][0].query].writes else "token", fontsize=7)
    return figure


def _pooled(weights_TS: Tensor) -> Tensor:
    """Return a picture of at most ``PIXELS`` a side, the largest of each block: a thin line stays visible."""
    size = -(-max(weights_TS.shape) // PIXELS)
    if size == 1:
        return weights_TS
    sides = [F.max_pool2d((sign * weights_TS)[None, None], size, ceil_mode=True)[0, 0] for sign in (1, -1)]
    return torch.where(sides[0] >= sides[1], sides[0], -sides[1])


def _label(token: str) -> str:
    return token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").strip() or "\N{OPEN BOX}"
