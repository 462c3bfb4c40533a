"""Metrics under the precision plugins of Lightning: none of them may round what is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from torch import Tensor, nn

from llmkit.contracts import Batch
from llmkit.ops.metrics import Metrics

PLUGINS: dict[str, Callable[[], Precision]] = {
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
}
"""What makes each plugin that casts a model; those of FSDP cast alike, and the mixed ones leave metrics alone."""


def measured(
    name: str, make: Callable[[], dict[str, nn.Module]], batches: Iterable[Batch], update: Callable[[Batch, Any], None]
) -> dict[str, Tensor]:
    """Return metrics as a run with a precision plugin computes them, with a network that is left as it is.

    The plugin builds and casts the metrics and converts single numbers of a batch. What the network reads is not
    converted: its rounding is not the metrics'.

    Args:
        name: one of ``PLUGINS``.
        make: builds the metrics.
        batches: what they are of.
        update: updates them with a batch.
    """
    plugin = PLUGINS[name]()
    with plugin.module_init_context():
        metrics = Metrics(make)
    metrics = plugin.convert_module(metrics)  # type: ignore[assignment]
    for batch in batches:
        update({key: _converted(plugin, value) for key, value in batch.items()}, dict(metrics.items()))
    return {key: metric.compute().cpu().double() for key, metric in metrics.items()}  # type: ignore[operator]


def _converted(plugin: Precision, value: Any) -> Any:
    return plugin.convert_input(value) if isinstance(value, Tensor) and value.dim() == 0 else value
