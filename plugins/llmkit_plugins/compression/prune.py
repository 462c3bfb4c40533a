"""Weights set to zero one by one, and stored without the zeros."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration, Compression, Packed
from llmkit.errors import UserError
from llmkit_plugins.compression.maps import maps, of_model, percent, positive, second_moments

BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class Sparse(Packed):
    """A matrix (rows, columns) with as many weights in each row that are not zero, and a bit for each place.

    ``values`` has those weights, (rows, kept), row by row: they alone are trained, the zeros stay zero.

    Args:
        weight: gives shape, dtype and device.
        kept: weights of a row that are kept.
    """

    def __init__(self, weight: Tensor, kept: int) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns))
        self.kept = kept
        self.values = nn.Parameter(weight.new_empty(rows, kept))
        self.bits: Tensor
        self.register_buffer("bits", weight.new_zeros((rows * columns + 7) // 8, dtype=torch.uint8))
        self._matrix: tuple[Any, Tensor] | None = None

    def take(self, weight: Tensor, mask: Tensor) -> None:
        """Keep the weights where the mask, (rows, columns), is true."""
        flat = mask.flatten()
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        self.bits.copy_((padded * torch.tensor(BITS, device=flat.device)).sum(1))
        self.values.copy_(weight[mask].view_as(self.values))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *given)
        if self.mask().sum(1).ne(self.kept).any():  # which would mix up the rows, or find too few values
            given[-1].append(f"{prefix}bits should have {self.kept} weights in each row")

    def mask(self) -> Tensor:
        """Return which weights are kept, (rows, columns)."""
        rows, columns = self.shape
        bits = self.bits[:, None] & torch.tensor(BITS, dtype=torch.uint8, device=self.bits.device)
        return bits.ne(0).flatten()[: rows * columns].view(rows, columns)

    def forward(self) -> Tensor:
        """Return the matrix with its zeros; without gradients it is made once and remembered."""
        if torch.is_grad_enabled():
            return self._dense()
        own = self._parameters.get("values")  # another method may have packed it
        now = (self.bits.device, None if own is None else (id(own), own.data_ptr(), own._version))
        if self._matrix is None or self._matrix[0] != now:
            self._matrix = now, self._dense()
        return self._matrix[1]

    def _dense(self) -> Tensor:
        values = self.values
        return values.new_zeros(self.shape).masked_scatter(self.mask(), values)


class Prune(Compression):
    """The weights of the smallest magnitude become zero, in each row of each linear map.

    Han et al. 2015, arXiv:1506.02626; the groups that are compared are rows, as Sun et al. 2023 (arXiv:2306.11695)
    recommend. The file gets smaller: it has the other weights and one bit for each place. Nothing gets faster and no
    memory is saved while the model runs, for the products are those of whole matrices. In further training
    (``model.init_from``) the zeros stay zero.

    Args:
        share: share of the weights of a row that become zero, rounded to whole weights.
        keep: in the place of ``share``, how many of each ``of`` neighbouring columns are kept: 2 of 4.
        of: the size of these groups; columns that are left over at the end of a row are kept.
    """

    trains: ClassVar[bool] = True

    def __init__(self, share: float = 0.5, keep: int | None = None, of: int = 4) -> None:
        if not 0 < share < 1:
            raise UserError(f"share must be above 0 and below 1, got {share}")
        if keep is not None and not 0 < keep < of:
            raise UserError(f"keep must be at least 1 and less than of, got {keep} of {of}")
        self.share, self.keep, self.of = share, keep, of

    @classmethod
    def arguments(cls, text: str) -> dict[str, Any]:
        """Return what ``50``, the percentage of weights that become zero, or ``2:4``, 2 of 4 are kept, stands for."""
        groups = re.fullmatch(r"(\d+):(\d+)", text)
        if groups:
            return {"keep": int(groups[1]), "of": int(groups[2])}
        return {"share": percent(text, "the percentage of weights to remove")}

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Replace each map; returns how many weights of a row are kept by name, and the share that is zero now."""
        moments = {} if rows is None else second_moments(model, rows)
        kept: dict[str, int] = {}
        zeros = total = 0
        for matrix in maps(model):
            weight = matrix.weight.detach()
            norms = moments[matrix.name].diagonal().sqrt() if matrix.name in moments else 1.0
            mask = self._mask(weight.double().abs() * norms)
            sparse = Sparse(weight, int(mask[0].sum()))
            sparse.take(weight, mask)
            matrix.replace(sparse)
            kept[matrix.name] = sparse.values.shape[1]
            zeros, total = zeros + mask.numel() - int(mask.sum()), total + mask.numel()
        note = "computes with whole matrices"
        return {"kept": kept, "zeros": zeros / total, "note": note}

    def _mask(self, scores: Tensor) -> Tensor:
        """Return which weights are kept, (rows, columns): of equal ones in a row the first."""
        rows, columns = scores.shape
        mask = torch.ones_like(scores, dtype=torch.bool)
        if self.keep is None:
            lowest = scores.flip(1).argsort(stable=True, dim=1)[:, : min(round(self.share * columns), columns - 1)]
            return mask.scatter(1, columns - 1 - lowest, value=False)
        whole = columns // self.of * self.of
        groups = scores[:, :whole].reshape(-1, self.of)
        best = groups.argsort(stable=True, dim=1, descending=True)[:, : self.keep]
        mask[:, :whole] = torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, value=True).view(rows, whole)
        return mask

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Put empty sparse matrices in the place of the maps."""
        found = {matrix.name: matrix for matrix in maps(model)}
        for name, kept in of_model(made["kept"], {**found}).items():
            found[name].replace(Sparse(found[name].weight, min(positive(kept), found[name].weight.shape[1])))


class Wanda(Prune):
    """``prune`` by the magnitude of a weight times the norm of the input that it is multiplied with.

    Sun et al. 2023, arXiv:2306.11695: a small weight on a large input matters more than a large one on a small input.
    Maps that are not called as a module are pruned by magnitude; of a recurrence the inputs and the states are seen.

    Args:
        share: share of the weights of a row that become zero, rounded to whole weights.
        keep: in the place of ``share``, how many of each ``of`` neighbouring columns are kept: 2 of 4.
        of: the size of these groups; columns that are left over at the end of a row are kept.
    """

    reads: ClassVar[bool] = True
