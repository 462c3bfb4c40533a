"""Training batches straight from a stream of rows, for data too large to be tokenized ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from llmkit.contracts import Batch
from llmkit.data.examples import Examples, Features
from llmkit.data.prepare import Encoder, Item, num_characters
from llmkit.data.rows import Skipped
from llmkit.data.tokens import Blocks, Packed, Tokens, joined, split_batches
from llmkit.errors import Problem, UserError, note

HELD_OUT = (1000, 2_000_000)  # the most rows and characters at the start of a stream that become validation data
SAMPLE = (10_000, 20_000_000)  # the most after those that the tokenizer and the head learn from


def take(items: Iterable[Item], limits: tuple[int, int]) -> Iterator[Item]:
    """Yield the first items, until a limit of rows and characters is reached; at least one."""
    rows, characters = limits
    for item in items:
        yield item
        rows -= 1
        characters -= num_characters(item)
        if rows <= 0 or characters <= 0:
            return


@dataclass
class Stream(IterableDataset[Batch]):
    """Training batches of a stream.

    Rows are read into a pool, which is encoded, put into batches as a prepared split would be, and shuffled. Each
    worker of each rank reads its own rows. A resumed run reads again what it has seen, without using it.

    Args:
        read: yields the rows of one shard, from (shard, number of shards).
        skipped: bad rows; the first shard reports them, the first row at once, all of them after each pass.
        encoder: encodes the rows.
        batch_size: rows of a batch.
        batch_tokens: most tokens of a batch of examples.
        pack: whether documents are packed.
        pool: rows, or blocks of ``context`` tokens, that are shuffled together.
        seed: seed of the order.
        rank: this process.
        world: number of processes.
        endless: start over at the end, because the other ranks would wait for one that runs out early.
    """

    read: Callable[[int, int], Iterator[Item]]
    skipped: Skipped
    encoder: Encoder
    batch_size: int
    batch_tokens: int | None
    pack: bool
    pool: int
    seed: int
    rank: int
    world: int
    endless: bool
    epoch: int = 0
    start: int = 0

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        start = self.start
        # The loader asks worker 0 first: in a resumed run worker 0 takes the shard of the worker whose turn it is. With
        # 2 workers and 5 batches done, worker 0 reads shard 1 from its batch 2 on, worker 1 shard 0 from its batch 3.
        worker = ((info.id if info else 0) + start) % workers
        shard = self.rank * workers + worker
        skip = (start - worker + workers - 1) // workers
        return islice(self._rounds(shard, self.world * workers), skip, None)

    def _rounds(self, shard: int, shards: int) -> Iterator[Batch]:
        self.skipped.at_once = shard == 0
        for number in count() if self.endless else (0,):
            empty = True
            for batch in self._batches(shard, shards, number):
                empty = False
                yield batch
            report = self.skipped.summary(self.skipped.seen)
            if empty and report and self.skipped.count == self.skipped.seen:
                raise UserError(Problem(self.skipped.key, report))
            if empty and self.endless:
                raise UserError(Problem(self.skipped.key, f"too few rows for {shards} readers"))
            if report and shard == 0:
                note(f"{self.skipped.key}: {report}")

    def _batches(self, shard: int, shards: int, number: int) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, self.epoch, number, shard])
        items = self.read(shard, shards)
        if not self.encoder.joins:
            return self._examples(items, rng)
        pieces = chain.from_iterable(self.encoder.groups(items, self.skipped))
        ids = joined(pieces, self.encoder.tokenizer, self.pack, self.encoder.joins)
        return self._packed(ids, rng) if self.pack else self._blocks(ids, rng)

    @property
    def _pool_rows(self) -> int:
        """Rows of a pool: whole batches."""
        return max(1, self.pool // self.batch_size) * self.batch_size

    def _examples(self, items: Iterator[Item], rng: np.random.Generator) -> Iterator[Batch]:
        while pool := list(islice(items, self._pool_rows)):
            features = Features.of(self.encoder.groups(pool, self.skipped))
            if features.count:
                head, tokenizer = self.encoder.head, self.encoder.tokenizer
                shared = self.encoder.context * self.pack
                split = Examples(features, head, tokenizer, self.batch_size, self.batch_tokens, shared)
                yield from (split[indices] for indices in split.training_order(rng))

    def _blocks(self, stream: Iterator[tuple[list[int], int, bool]], rng: np.random.Generator) -> Iterator[Batch]:
        context = self.encoder.context
        size = self._pool_rows * context
        # Each pass leaves out another number of tokens at its start, so that blocks are cut at other places.
        offset = int(rng.integers(context))
        pool: list[int] = []
        seen = num_bytes = 0
        yielded = False
        for ids, length, _ in chain(stream, [([], 0, True)]):
            pool += ids
            seen, num_bytes = seen + len(ids), num_bytes + length
            last = not ids
            while len(pool) > size + offset or (last and len(pool) > 1):
                pool, offset = pool[min(offset, max(0, len(pool) - 1 - context)) :], 0
                blocks = min(self._pool_rows, (len(pool) - 1) // context)
                if blocks == 0 and yielded:
                    return
                # A stream of less than a block is padded.
                data = np.array(pool[: blocks * context + 1 if blocks else None])
                tokens = Tokens(data, "int64", data.size, num_bytes / seen * (data.size - 1))
                split = Blocks(tokens, context, self.batch_size, self.encoder.tokenizer.pad_id)
                starts = rng.permutation(max(1, blocks)) * context
                yield from (split[indices] for indices in split_batches(starts, self.batch_size))
                yielded = True
                pool = pool[data.size - 1 :]  # the last target is the first token of the next block

    def _packed(self, stream: Iterator[tuple[list[int], int, bool]], rng: np.random.Generator) -> Iterator[Batch]:
        pool: list[int] = []
        starts: list[int] = []
        num_bytes = 0
        for ids, length, begins in chain(stream, [([], 0, True)]):
            if pool and (not ids or (begins and len(pool) >= self._pool_rows * self.encoder.context)):
                tokens = Tokens(np.array(pool), "int64", len(pool), num_bytes, np.array([*starts, len(pool)]))
                split = Packed(tokens, self.encoder.context, self.batch_size, self.encoder.tokenizer.pad_id)
                order = rng.permutation(split.num_rows)
                yield from (split[rows] for rows in split_batches(order, self.batch_size))
                pool, starts, num_bytes = [], [], 0
            if begins:
                starts.append(len(pool))
            pool += ids
            num_bytes += length
