"""From the maps of single layers to that of a stack: rollout (Abnar and Zuidema 2020, arXiv:2005.00928)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(map_HTS: Tensor) -> Tensor:
    """Return a layer's map averaged over its heads, as shares that sum to 1 over the keys, (T, S).

    Weights of either sign count by their size. A query that looks at nothing keeps zeros.
    """
    weights_TS = map_HTS.abs().mean(0)
    return weights_TS / weights_TS.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TS.dtype).tiny)


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Return how much each position's last state rests on each token, (T, T), by the product of the layers' maps.

    Each layer passes on half by its residual connection: the factor of a layer is (A + I) / 2.

    Args:
        maps: the map of each layer, first to last, (H, T, T).
    """
    product_TT = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    identity_TT = product_TT
    for map_HTT in maps:
        product_TT = (shares(map_HTT) + identity_TT) / 2 @ product_TT
    return product_TT
