"""What the Trainer costs: ``llmkit fit`` beside a plain loop around the very same network.

    python benchmarks/trainer.py

The plain loop has batches that lie ready, the loss, the gradient, clipping and the fused optimizer, and nothing else.
``llmkit fit`` loads its batches, logs loss and learning rate, shows its progress, steps a schedule, looks for steps
that are not finite, and writes a checkpoint.
"""

from __future__ import annotations

import functools
import statistics

from kit import OURS, Report, arguments
from peers import Shape
from torch import Tensor
from train import batches, ours
from turns import Seat, plain, step_of, take_turns

from llmkit import plugin, registry
from llmkit.model.backbone import Backbone
from llmkit.ops.losses import linear_cross_entropy
from llmkit.sequence import Sequence

CASES = {
    "small": (Shape(4, 128, 4, 64, 12, 65), 15, "at most 2 % over"),
    "tiny": (Shape(1, 16, 2, 8, 2, 65), 200, "at most 1.5 ms a step over"),
}


def network(shape: Shape) -> Backbone:
    """Return llmkit's network of a shape, with its default parts."""
    return Backbone(
        vocab_size=shape.vocab,
        dim=shape.dim,
        num_layers=shape.layers,
        topology="decoder",
        max_length=shape.context,
        attention=plugin("attention", "multi_head", num_heads=shape.heads),
        cross_attention=plugin("attention", "multi_head", num_heads=shape.heads),
        position=registry.resolve("position", None),
        feedforward=registry.resolve("feedforward", None),
        norm=registry.resolve("norm", None),
    )


def loop(seat: Seat, shape: Shape, block: int) -> None:
    """Train llmkit's network by a plain loop."""
    net = network(shape)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        found = linear_cross_entropy(
            net.decode(ids, Sequence.of(ids)).flatten(0, 1), net.output_weight_VD, targets.flatten()
        )
        return found.total / found.count

    plain(seat, step_of(net, loss, batches(shape)), block)


def main() -> None:
    """Measure both sizes."""
    args = arguments(__doc__)
    report = Report("trainer", args.json)
    for name, (shape, block, goal) in CASES.items():
        contestants = {
            OURS: functools.partial(ours, shape=shape, block=block, changes={}),
            "plain loop": functools.partial(loop, shape=shape, block=block),
        }
        found = take_turns(contestants, 2 * args.cycles)
        own, bare = (found[contestant].seconds for contestant in contestants)
        over = [(a - b) / block for a, b in zip(own, bare, strict=True)]
        case = f"{name}: {shape}"
        report.compare(
            case, {OURS: [s / block for s in own], "plain loop": [s / block for s in bare]}, "ms a step", 1e3
        )
        median = statistics.median(over)
        share = statistics.median((a - b) / b for a, b in zip(own, bare, strict=True))
        met = share <= 0.02 if name == "small" else median <= 1.5e-3
        report.add(case, "over by", round(median * 1e3, 3), f"ms a step, {share:.1%}", goal=goal, met=met)
    report.close()


if __name__ == "__main__":
    main()
