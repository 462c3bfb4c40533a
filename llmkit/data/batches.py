"""The order of batches as a pure function of seed and epoch, shared out over ranks, and a loader that can resume it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from llmkit.data.tokens import Index

Plan = Callable[[np.random.Generator], Sequence[Index]]


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class Progress:
    """Where a training order stands: the epoch, and the batches of it that a resumed run leaves out.

    Lightning counts an epoch that ``max_steps`` cut short as done. Therefore the first epoch number it announces is
    only a reference: that one is the epoch we were told to begin with, the next one is the next.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.epoch, self.start = epoch, 0
        self._first: tuple[int, int] | None = None  # (announced, ours)

    def set_epoch(self, announced: int) -> None:
        """Take over Lightning's announcement that this epoch begins."""
        if self._first is None:
            self._first = (announced, self.epoch)
        epoch = announced - self._first[0] + self._first[1]
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Go to a batch of an epoch."""
        self.epoch, self.start, self._first = epoch, start, None


class TrainingOrder(Progress, Sampler[Index]):
    """The batches of each epoch for this rank: every rank gets equally many, a remainder of the epoch is left out.

    Args:
        plan: gives the index arrays of an epoch, always ``count`` of them.
        fixed: every epoch is as the first one (Lightning's ``overfit_batches``).
    """

    def __init__(self, plan: Plan, count: int, seed: int, epoch: int = 0, fixed: bool = False) -> None:
        super().__init__(epoch)
        self.plan, self.count, self.seed, self.fixed = plan, count, seed, fixed

    def __len__(self) -> int:
        return max(1, self.count // world()[1])

    def __iter__(self) -> Iterator[Index]:
        rank, size = world()
        batches = self.plan(np.random.default_rng([self.seed, 0 if self.fixed else self.epoch]))
        for number in range(self.start, len(self)):
            yield batches[(number * size + rank) % len(batches)]


class EvaluationOrder(Sampler[Index]):
    """The batches of an evaluation for this rank; each one is seen by exactly one rank.

    Batches are halved until every rank gets equally many, where there are rows enough: ranks that run out early
    would leave the others waiting.
    """

    def __init__(self, plan: Callable[[], Sequence[Index]]) -> None:
        self.plan = plan

    @cached_property
    def _batches(self) -> list[Index]:
        batches = list(self.plan())
        while len(batches) % world()[1]:
            at = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[at]) // 2
            if half == 0:
                break
            batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
        return batches

    def __len__(self) -> int:
        rank, size = world()
        return len(range(rank, len(self._batches), size))

    def __iter__(self) -> Iterator[Index]:
        rank, size = world()
        yield from self._batches[rank::size]


class Loader(DataLoader[Any]):
    """A loader of finished batches. Its own generator keeps it from touching the global random state.

    With ``order``, its state is where training stands. ``done`` tells how many batches of the current epoch the
    training loop has processed, and whether that was all of them; what workers have fetched ahead does not count.
    """

    order: Progress | None = None
    done: Callable[[], tuple[int, bool]] | None = None

    def __init__(self, dataset: Any, num_workers: int = 0, **kwargs: Any) -> None:
        kwargs = {"batch_size": None, "generator": torch.Generator(), **kwargs}
        super().__init__(dataset, num_workers=num_workers, **kwargs)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that are done; a complete epoch is the next one's start."""
        if self.order is None or self.done is None:
            return {}
        count, complete = self.done()
        epoch = self.order.epoch
        return {"epoch": epoch + 1, "batches": 0} if complete else {"epoch": epoch, "batches": count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state_dict`` was taken."""
        if self.order is not None and state:
            self.order.resume(state["epoch"], state["batches"])
