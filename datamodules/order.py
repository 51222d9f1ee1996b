"""The order of a stream: a pure function of (seed, epoch, position).

Shards are permuted, taken a group at a time, and the records of a group are permuted together:
well mixed, yet near each other on disk. Ranks and workers take their share of the one global order,
so every record appears exactly once an epoch however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fewstep.seeding import numpy_generator

Order = np.ndarray[tuple[int], np.dtype[np.int64]]


def epoch_order(sizes: Sequence[int], seed: int, epoch: int, shards_per_group: int = 64) -> Order:
    """Record numbers in the order of one epoch, ``(sum(sizes),)``.

    Args:
        sizes: number of records of each shard.
        seed, epoch: the order's name.
        shards_per_group: how many shards are mixed at a time.
    """
    generator = numpy_generator(seed, "order", epoch)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = generator.permutation(len(sizes))
    groups = [shards[i : i + shards_per_group] for i in range(0, len(shards), shards_per_group)]
    pieces = []
    for group in groups:
        records = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in group])
        pieces.append(generator.permutation(records))
    return np.concatenate(pieces).astype(np.int64)


class EndlessBatches:
    """A batch sampler over endless epochs that can begin anywhere.

    Batch ``b`` of rank ``r`` holds the global positions ``(b W + r) B .. (b W + r) B + B - 1``
    after ``start``. Batches run across the ends of epochs, so none is short and none is dropped.

    Args:
        sizes: number of records of each shard.
        batch_size: records a batch and rank, ``B``.
        seed: of the order.
        rank, world_size: this process and their number, ``W``.
        start: records all ranks together have consumed before.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.sizes = sizes
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        total = int(sum(self.sizes))
        position = self.start + self.rank * self.batch_size
        orders: dict[int, Order] = {}
        while True:
            wanted = np.arange(position, position + self.batch_size)
            epochs = wanted // total
            for epoch in np.unique(epochs):
                if int(epoch) not in orders:
                    orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                    orders[int(epoch)] = epoch_order(self.sizes, self.seed, int(epoch))
            yield [int(orders[int(e)][p % total]) for e, p in zip(epochs, wanted, strict=True)]
            position += self.batch_size * self.world_size


class FiniteBatches:
    """Every record once, in order; ranks take alternate batches and the last may be short."""

    def __init__(self, total: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.total = total
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.total, self.batch_size * self.world_size)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.total)))
