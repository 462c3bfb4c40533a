"""How the time of a training step grows with length, width, depth and batch, for every attention variant there is.

Forward and backward of a decoder with all of llmkit's defaults beside the variant, 16 tokens to embed, no output and
no optimizer. For each of the four sizes the others stay as they are, and the exponent is the slope of log time against
log size over the upper half of the sizes. Beside it stands the slope of the operations that the model counts
(``flops_per_position``) over the same sizes; a slope at most 0.2 above that counts as reached. Small models spend time
on what does not grow, so that most slopes are below the count. A single run is no more exact than about 0.1.

    python benchmarks/growth.py [--only linear]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

import torch
from kit import Report, arguments, interleave

from llmkit import plugin, registry
from llmkit.model.backbone import Backbone
from llmkit.sequence import Sequence as Positions

BASE = {"length": 128, "width": 64, "depth": 1, "batch": 2}
SIZES: dict[str, tuple[int, ...]] = {
    "length": (128, 256, 512, 1024, 2048),
    "width": (32, 64, 128, 256, 512),
    "depth": (1, 2, 4, 8),
    "batch": (2, 4, 8, 16),
}
ABOVE = 0.2  # how much steeper than the count may be


def main() -> None:
    """Measure every variant along every size."""
    args = arguments(__doc__, only="")
    report = Report("growth", args.json)
    variants = [name for name in sorted(registry.entries("attention")) if args.only in name]
    for axis, sizes in SIZES.items():
        steps: dict[str, Callable[[], None]] = {}
        operations: dict[str, float] = {}
        for variant in variants:
            for size in sizes:
                key = f"{variant} {size}"
                steps[key], operations[key] = point(variant, **{**BASE, axis: size})
        times = interleave(steps, args.cycles)
        upper = sizes[(len(sizes) - 1) // 2 :]
        for variant in variants:
            measured = slope(upper, [median(times[f"{variant} {size}"]) for size in upper])
            counted = slope(upper, [operations[f"{variant} {size}"] for size in upper])
            each = ", ".join(f"{1e3 * median(times[f'{variant} {size}']):.1f}" for size in sizes)
            report.add(
                f"{axis} {upper[0]} to {upper[-1]}", variant, round(measured, 3), f"exponent (ms: {each})",
                goal=f"{counted:.2f} counted", met=measured <= counted + ABOVE,
                note=f"the times are those of a step at {axis} {', '.join(map(str, sizes))}",
            )  # fmt: skip
    report.close()


def point(variant: str, length: int, width: int, depth: int, batch: int) -> tuple[Callable[[], None], float]:
    """Return a step of a network of these sizes, and how many operations are counted for it."""
    torch.manual_seed(0)
    net = Backbone(
        vocab_size=16,
        dim=width,
        num_layers=depth,
        topology="decoder",
        max_length=length,
        attention=plugin("attention", variant),
        cross_attention=plugin("attention", variant),
        position=registry.resolve("position", None),
        feedforward=registry.resolve("feedforward", None),
        norm=registry.resolve("norm", None),
    )
    ids = torch.randint(16, (batch, length))

    def step() -> None:
        net.decode(ids, Positions.dense(length)).sum().backward()
        net.zero_grad(set_to_none=True)

    return step, 3 * net.flops_per_position(length) * batch * length


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent b of values ~ a * size ** b, fitted by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


if __name__ == "__main__":
    main()
