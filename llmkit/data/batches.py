"""The order of batches as a pure function of seed and epoch, divided among ranks, and a loader that can resume it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, SequentialSampler

from llmkit.data.tokens import Index
from llmkit.lightning import batches_done

Plan = Callable[[np.random.Generator], Sequence[Index]]


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class Position:
    """Where training stands in its data: the epoch, and how many of its batches are done.

    It counts the batches that the trainer has trained on. Workers have fetched more than those, and Lightning counts
    other epochs: for it an epoch that ``max_steps`` cuts short is over, and the first one of a resumed run may be a
    single batch. Training continues with the next batch in all these cases.

    Args:
        trainer: knows how many batches it has trained on; None: every batch that the loader yields counts.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer
        self.length: int | None = None  # batches of an epoch, where that is known
        self.resume(0, 0)

    def resume(self, epoch: int, batches: int) -> None:
        """Go to a batch of an epoch."""
        self._epoch, self._start = epoch, batches
        self._trained: int | None = None  # batches trained on before this iteration
        self._delivered, self._exhausted = 0, False

    def state(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that are done, as arguments of ``resume``."""
        done = 0 if self._trained is None else self._count() - self._trained
        epoch, batches = self._epoch, self._start + done
        if self.length is not None:
            epoch, batches = epoch + batches // self.length, batches % self.length
        elif self._exhausted and done >= self._delivered:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches}

    def iterate(self, batches: Callable[[int, int], Iterator[Any]]) -> Iterator[Any]:
        """Yield ``batches(epoch, start)`` for the current position, and keep count."""
        self.resume(**self.state())
        self._trained = self._count()
        for batch in batches(self._epoch, self._start):
            self._delivered += 1
            yield batch
        self._exhausted = True

    def _count(self) -> int:
        return self._delivered if self.trainer is None else batches_done(self.trainer)


class TrainingOrder(SequentialSampler):
    """The batches of each epoch for this rank: each row comes once an epoch, and all ranks get equally many batches.

    If the number of batches is not a multiple of the number of ranks, the last batches are split into smaller ones; if
    there are not enough rows for that, some batches take an extra row. Rows repeat only when an epoch has fewer rows
    than there are ranks.

    Batch n goes to rank n % ranks. With 2 ranks, batches of 4, 4 and 3 rows become 4, 4, 1 and 2: rank 0 trains on
    4 and on 1 row, rank 1 on 4 and on 2.

    One iteration is as long as an epoch, from ``start`` on into the next epoch. (It is a SequentialSampler because
    Lightning replaces any other with one that counts rows when ``overfit_batches`` is set.)

    Args:
        plan: returns the index arrays of an epoch, none of them empty.
        count: number of index arrays, the same in every epoch.
        rows: total number of rows in them.
        seed: seed of the order.
        fixed: repeat the first iteration (for ``overfit_batches``).
    """

    def __init__(self, plan: Plan, count: int, rows: int, seed: int, fixed: bool = False) -> None:
        self.plan, self.count, self.rows, self.seed, self.fixed = plan, count, rows, seed, fixed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        size = world()[1]
        return max(1, min(-(-self.count // size), self.rows // size))

    def __iter__(self) -> Iterator[Any]:
        rank, size = world()
        epoch, start = (0, 0) if self.fixed else (self.epoch, self.start)
        # A run resumed at batch 3 of 5 iterates over batches 3 and 4 of this epoch, then 0, 1 and 2 of the next one.
        for part in (range(start, len(self)), range(start)):
            batches = self._shared(self.plan(np.random.default_rng([self.seed, epoch])), size) if part else []
            for number in part:
                yield batches[(number * size + rank) % len(batches)]
            epoch += 1

    def _shared(self, batches: Sequence[Index], size: int) -> Sequence[Index]:
        """Return the same rows in ``len(self)`` batches per rank; fewer rows than ranks stay single."""
        if size == 1:
            return batches
        # A round is one batch for each rank. 4, 4 and 3 rows for 2 ranks: two rounds of 2 batches; the first round
        # stays as it is, and the last batch is halved to fill the second.
        rounds, found = len(self), list(batches)
        count = rounds * size
        # Too few rows for another round: 1, 1 and 1 rows for 2 ranks become 2 and 1.
        for number, batch in enumerate(found[count:], count - size):
            found[number] = np.concatenate([found[number], batch])
        found = found[:count]
        # Split as few of the last rounds as have enough rows.
        first = rounds - 1
        while first > 0 and sum(map(len, found[first * size :])) < (rounds - first) * size:
            first -= 1
        return found[: first * size] + halved(found[first * size :], count - first * size)


class EvaluationOrder(SequentialSampler):
    """The batches of an evaluation for this rank; each row is seen by exactly one rank.

    Batches are halved until every rank gets equally many, if there are enough rows: the other ranks would wait for a
    rank that runs out early.

    Args:
        plan: returns the batches, sorted by length or in the order of the text.
        spread: let any first batches represent all of them, so that ``limit_val_batches`` measures nearly the same.
    """

    def __init__(self, plan: Callable[[], Sequence[Index]], spread: bool = True) -> None:
        self.plan, self.spread = plan, spread

    @cached_property
    def _batches(self) -> list[Index]:
        batches, size = self.plan(), world()[1]
        found = halved(batches, -(-len(batches) // size) * size)
        return [found[i] for i in evenly(len(found))] if self.spread else found

    def __len__(self) -> int:
        rank, size = world()
        return len(range(rank, len(self._batches), size))

    def __iter__(self) -> Iterator[Any]:
        rank, size = world()
        yield from self._batches[rank::size]


def evenly(count: int) -> list[int]:
    """Return the numbers below ``count`` so that the first few, however many, lie evenly among all of them.

    10 become 5, 2, 7, 4, 9, 1, 6, 3, 8, 0. They are sorted by the fraction of their distance to the middle times the
    golden ratio, which spreads most evenly of all numbers (Knuth, The Art of Computer Programming 3, section 6.4).
    """
    return sorted(range(count), key=lambda number: (number - count // 2) * (5**0.5 - 1) / 2 % 1)


def halved(batches: Sequence[Index], count: int) -> list[Index]:
    """Halve the largest batch repeatedly until there are ``count`` batches, or all are single rows.

    Batches of 5 and 3 rows become, for a count of 4, 2, 1, 2 and 3 rows: 5 is cut into 2 and 3, that 3 into 1 and 2.
    Half a batch never needs more memory than the whole, whether it was planned by rows or by tokens.
    """
    found = list(batches)
    while len(found) < count:
        at = max(range(len(found)), key=lambda i: len(found[i]))
        half = len(found[at]) // 2
        if half == 0:
            break
        found[at : at + 1] = [found[at][:half], found[at][half:]]
    return found


def _unchanged(batch: Any) -> Any:
    """Return the batch: torch's own ``collate_fn`` would visit every string in it."""
    return batch


class Loader(DataLoader[Any]):
    """A loader of finished batches. Its own generator keeps it from touching the global random state.

    With a ``position`` it is a training loader: an iteration begins where training stands. The position is its
    state, which Lightning keeps in checkpoints.
    """

    position: Position | None = None

    def __init__(self, dataset: Any, num_workers: int = 0, **kwargs: Any) -> None:
        # Lightning may build the loader again with all of torch's arguments.
        kwargs = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator(), **kwargs}
        super().__init__(dataset, num_workers=num_workers, **kwargs)

    def __iter__(self) -> Any:
        return super().__iter__() if self.position is None else self.position.iterate(self._batches)

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        order: Any = self.sampler if isinstance(self.sampler, TrainingOrder) else self.dataset
        order.epoch, order.start = epoch, start
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return the position of training."""
        return {} if self.position is None else self.position.state()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the position that ``state_dict`` returned."""
        if self.position is not None:
            self.position.resume(**state)
