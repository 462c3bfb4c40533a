"""Weights sharded over the processes of a mesh (FSDP2)."""

from __future__ import annotations

from typing import Any

from llmkit.contracts import Head
from llmkit.errors import Problem, UserError
from llmkit.model.backbone import Backbone, Layer


def shard(net: Backbone, head: Head, mesh: Any) -> None:
    """Shard the weights, layer by layer (``ModelParallelStrategy``).

    Raises UserError for a mesh that would split single matrices.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if mesh["tensor_parallel"].size() > 1:
        text = (
            "llmkit shards over data_parallel only; give ModelParallelStrategy data_parallel_size: "
            "(number of processes) and tensor_parallel_size: 1"
        )
        raise UserError(Problem("trainer.strategy", text))
    mesh = mesh["data_parallel"]
    for module in net.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    # These are called by name; the weights must be gathered then, as they are for forward.
    for method in ("encode", "decode"):
        register_fsdp_forward_method(net, method)
    if any(True for _ in head.parameters()):
        fully_shard(head, mesh=mesh)
        for method in ("loss", "evaluate", "predict", "sample"):
            register_fsdp_forward_method(head, method)
