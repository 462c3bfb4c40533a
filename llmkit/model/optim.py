"""Optimizers and schedules with good defaults. Any class of torch.optim works in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

FUSED = {"cpu", "cuda", "xpu", "mps"}
"""Device types with a fused AdamW."""


class AdamW(torch.optim.AdamW):
    """AdamW in its fused form (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        params: parameters or groups.
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decay of matrices; vectors are in a group without it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        groups = list(params)
        devices = {p.device.type for g in groups for p in (g["params"] if isinstance(g, dict) else [g])}
        fused = devices <= FUSED
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        # Unscaling is left to the gradient scaler, so that gradients can be clipped under mixed precision.
        self._step_supports_amp_scaling = False


class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices, AdamW for everything else.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    Matrices of one shape are orthogonalised together, in bf16 where the hardware multiplies it fast. The weights equal
    those of ``torch.optim.Muon``, in bf16 to the bit, when that one gets each map as a matrix of its own and gradients
    are not tiny (of a norm below 1e-4, where the term against division by zero shows). It is not used because torch 2.6
    to 2.8 lack it, it takes 2-D matrices only, and it always computes in bf16, which is twenty times slower on a CPU
    without bf16 matmuls.

    Args:
        params: groups, each with its ``kind``: ``matrix``, ``embedding`` or ``vector``. A group of matrices may say in
            ``maps`` the rows of the maps that each parameter holds (queries, keys and values in one weight, the gates
            of an LSTM): each of them is orthogonalised by itself.
        lr: learning rate of the matrices.
        momentum: decay of the matrices' momentum (Nesterov).
        weight_decay: decay of the matrices and embeddings.
        adam_lr: learning rate of embeddings and vectors.
        betas: decay rates of their two moments.
        num_iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adam_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        num_iterations: int = 5,
    ) -> None:
        groups: list[dict[str, Any]] = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        for group in groups:
            # In a group without a kind (plain parameters) matrices look like embeddings, so AdamW takes them.
            group["lr"] = lr if group.get("kind") == "matrix" else adam_lr
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": 1e-8}
        )
        self.num_iterations = num_iterations
        # A step whose gradient is not finite is skipped on the device, as in torch's fused optimizers.
        self.reads_found_inf = all(p.device.type in FUSED for group in self.param_groups for p in group["params"])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns the closure's loss if there is one."""
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if group.get("kind") == "matrix":
                    self._orthogonal(group)
                elif parameters:
                    self._adam(group, parameters)
        return loss

    def _orthogonal(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        bad: Tensor | None = getattr(self, "found_inf", None)
        every = group["params"]
        for parameter, rows in zip(every, group.get("maps") or [[len(p)] for p in every], strict=True):
            if parameter.grad is not None:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                for piece in zip(*(x.split(rows) for x in (parameter, parameter.grad, buffer)), strict=True):
                    shapes.setdefault(piece[0].shape, []).append(piece)
        for shape, pieces in shapes.items():
            members, grads, buffers = map(list, zip(*pieces, strict=True))
            if bad is not None:  # then the momentum is its own average with this
                grads = [torch.where(bad > 0, buffer, grad) for grad, buffer in zip(grads, buffers, strict=True)]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            matrices = torch.stack(updates).flatten(2)
            scale = math.sqrt(max(1.0, shape[0] / matrices[0].shape[1]))
            directions = orthogonalise(matrices, self.num_iterations).reshape(len(members), *shape)
            decay: Any = 1 - group["lr"] * group["weight_decay"]
            if bad is not None:
                directions, decay = directions * (bad == 0), torch.where(bad > 0, 1.0, decay)
            if group["weight_decay"]:
                torch._foreach_mul_(members, decay)
            torch._foreach_add_(members, list(directions.to(members[0].dtype)), alpha=-group["lr"] * scale)

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=parameters[0].device.type in FUSED,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Return approximately U V^T of each matrix U S V^T, (K, rows, columns), by a quintic Newton-Schulz iteration.

    Most singular values end between 0.68 and 1.21, which is all that Muon needs. The smallest ones do not get there:
    each iteration multiplies a value s, relative to the matrix's Frobenius norm, by at most 3.44, so that five leave it
    below 485 s. A square random matrix always has a few: one of 64 x 64 often ends with a smallest value below 0.3.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if fast_bf16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _OfSteps(LambdaLR):
    """A schedule whose rate is the peak times ``factor`` of the step, behind a linear warmup."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int, min_lr_ratio: float, total_steps: int | None) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be from 0 to 1, got {min_lr_ratio}")
        self.warmup_steps, self.min_lr_ratio, self.total_steps = warmup_steps, min_lr_ratio, total_steps
        super().__init__(optimizer, self._factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule only: a resumed run takes the settings from its config."""
        state: dict[str, Any] = super().state_dict()
        return {name: state[name] for name in ("last_epoch", "_step_count", "_last_lr") if name in state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from where ``state_dict`` was taken."""
        self.__dict__.update(state_dict)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 if self.total_steps is None else self._after_warmup(step, self.total_steps)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        raise NotImplementedError


class WarmupCosine(_OfSteps):
    """Linear warmup, then a cosine down to a share of the peak (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: steps of the linear warmup.
        min_lr_ratio: share of the peak at the end.
        total_steps: length of the schedule; None: the run's number of optimizer steps.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 100, min_lr_ratio: float = 0.1, total_steps: int | None = None
    ) -> None:
        super().__init__(optimizer, warmup_steps, min_lr_ratio, total_steps)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(_OfSteps):
    """Linear warmup, a constant rate, and a decay at the end (Hu et al. 2024, arXiv:2404.06395).

    Until the decay begins, runs of all lengths are the same: one of them is a trunk that the others branch off.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: steps of the linear warmup.
        decay_share: share of the steps at the end in which the rate decays; 0: it stays constant.
        shape: of the decay: ``sqrt``, 1 minus the root of the share of its steps that are done (Hägele et al. 2024,
            arXiv:2405.18392), or ``linear``.
        min_lr_ratio: share of the peak at the end.
        total_steps: length of the schedule; None: the run's number of optimizer steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        decay_share: float = 0.2,
        shape: Literal["sqrt", "linear"] = "sqrt",
        min_lr_ratio: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if not 0 <= decay_share <= 1:
            raise ValueError(f"decay_share must be from 0 to 1, got {decay_share}")
        if shape not in ("sqrt", "linear"):
            raise ValueError(f"shape must be sqrt or linear, got {shape}")
        self.decay_share, self.shape = decay_share, shape
        super().__init__(optimizer, warmup_steps, min_lr_ratio, total_steps)

    @staticmethod
    def decay_steps(decay_share: float, total_steps: int) -> int:
        """Return how many steps the decay of a run takes."""
        return round(decay_share * total_steps)

    def _after_warmup(self, step: int, total_steps: int) -> float:
        start = max(self.warmup_steps, total_steps - self.decay_steps(self.decay_share, total_steps))
        if step <= start or start >= total_steps:
            return 1.0
        progress = min(1.0, (step - start) / (total_steps - start))
        left = 1 - (math.sqrt(progress) if self.shape == "sqrt" else progress)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left
