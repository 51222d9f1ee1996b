"""The stream of batches: which records each rank reads, update by update, from any position on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from datamodules.order import BucketsOf, EpochOrder, Integers, Layout
from fewstep.errors import FewstepError

Remainder = Literal["carry", "share", "drop"]
# For data that are read once, whole: no setting of a user's.
Once = Literal["repeat", "uneven"]


class Plan(NamedTuple):
    """What one rank reads for one batch.

    Attributes:
        epochs: ``(B,)`` which epoch each record is read in: a part of the name of its augmentation.
        records: ``(B, 2)`` (shard, number in the shard).
        upcoming: shards this lane reads next, to be fetched meanwhile.
    """

    epochs: Integers
    records: Integers
    upcoming: list[int]


@dataclass(frozen=True)
class Position:
    """How far the optimiser has come.

    Attributes:
        epoch: the current epoch.
        offset: records of it that all ranks together have consumed.
        batches: batches a rank has consumed of it, as Lightning counts them.
        layout: how this epoch is dealt out, if it was begun under another layout.
    """

    epoch: int = 0
    offset: int = 0
    batches: int = 0
    layout: Layout | None = None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Position:
        """The position that :meth:`state` describes."""
        layout = state["layout"]
        return cls(**{**state, "layout": None if layout is None else Layout(**layout)})


class Stream:
    """The batches of one rank, as a DataLoader's sampler.

    Args:
        sizes: number of records of each shard.
        batch_size: records a batch and rank, ``B``.
        seed: of the order.
        rank, world_size: this process and their number, ``W``.
        num_workers: loading processes of each rank.
        group_shards: how many shards a worker mixes at a time.
        remainder: what becomes of the records of an epoch that do not fill a batch on every rank.
            ``carry``: the batch is completed from the next epoch, and the stream never ends.
            ``share``: all ranks share them, as one shorter batch each (two where they are fewer
            than ranks). ``drop``: they are left out, other ones in each epoch. ``repeat``: shared
            too, and where they are too few for that, each rank gets one, and the first records of
            the epoch stand in for those that are missing. ``uneven``: shared too, but where they
            are fewer than ranks, some ranks get none and have one batch fewer, or no batch at all.
        shuffle: whether the order is permuted.
        buckets: see :class:`~datamodules.order.EpochOrder`.
        position: where to begin.
        look_ahead: whether plans name the upcoming shards.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        group_shards: int = 16,
        remainder: Remainder | Once = "carry",
        shuffle: bool = True,
        buckets: BucketsOf | None = None,
        position: Callable[[], Position] = Position,
        look_ahead: bool = False,
    ) -> None:
        self.sizes, self.total = sizes, int(sum(sizes))
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.remainder: Remainder | Once = remainder
        self.layout = Layout(
            lanes=world_size * max(1, num_workers),
            chunk=batch_size,
            group_shards=group_shards,
            shuffle=shuffle,
        )
        self.buckets, self.position, self.look_ahead = buckets, position, look_ahead
        self._round_sizes(self.total)  # complains at once where the data cannot be divided

    # ------------------------------------------------------------------ rounds

    @property
    def round_size(self) -> int:
        """Records all ranks together consume in an update."""
        return self.batch_size * self.world_size

    def _round_sizes(self, left: int) -> list[int]:
        """How the records left of an epoch are dealt out, update by update (not for ``carry``)."""
        whole, rest = divmod(left, self.round_size)
        if self.remainder == "carry":
            return []
        if self.remainder == "drop":
            if left == self.total and not whole:
                raise FewstepError(
                    f"{left} records do not fill one batch of {self.batch_size} on each of "
                    f"{self.world_size} ranks. Lower batch_size, or set remainder to share or "
                    "carry."
                )
            return [self.round_size] * whole
        if rest == 0:
            return [self.round_size] * whole
        if rest >= self.world_size or self.remainder == "uneven":
            return [self.round_size] * whole + [rest]
        last = self.round_size + rest
        if whole and last // 2 >= self.world_size:
            return [self.round_size] * (whole - 1) + [last - last // 2, last // 2]
        if self.remainder == "repeat":
            return [self.round_size] * whole + [self.world_size]
        raise FewstepError(
            f"{left} records cannot be shared by {self.world_size} ranks in batches of "
            f"{self.batch_size} so that each gets equally many batches and none is empty. "
            "Use fewer devices, a larger batch_size, or remainder: carry or drop."
        )

    def _part(self, size: int) -> tuple[int, int]:
        """Which records of a round are this rank's: the first, and the one after the last."""
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    def layout_of(self, position: Position, epoch: int) -> Layout:
        """An epoch goes on as it began; later ones have this run's own layout."""
        same = epoch == position.epoch and position.layout is not None
        return position.layout if same and position.layout else self.layout

    def after(self, position: Position, updates: int) -> Position:
        """The position once ``updates`` more batches of every rank are consumed."""
        if self.remainder == "carry":
            passed, offset = divmod(position.offset + updates * self.round_size, self.total)
            batches = position.batches + updates
        else:
            sizes = self._round_sizes(self.total - position.offset)
            if updates < len(sizes):
                passed, offset = 0, position.offset + sum(sizes[:updates])
                batches = position.batches + updates
            else:
                full = self._round_sizes(self.total)
                passed, batches = divmod(updates - len(sizes), len(full))
                passed, offset = passed + 1, sum(full[:batches])
        epoch = position.epoch + passed
        layout = self.layout_of(position, epoch)
        return replace(position, epoch=epoch, offset=offset, batches=batches, layout=layout)

    # ------------------------------------------------------------------ batches

    def __iter__(self) -> Iterator[Plan]:
        position = self.position()
        return self._endless(position) if self.remainder == "carry" else self._epoch(position)

    def __len__(self) -> int:
        """Batches of an epoch, this rank's.

        Raises:
            TypeError: for a stream that never ends, as ``len`` does for all that has none.
        """
        if self.remainder == "carry":
            raise TypeError("an endless stream has no length")
        position = self.position()
        left = position.batches + self._batches(self.total - position.offset)
        return max(left, self._batches(self.total))

    def _batches(self, left: int) -> int:
        """How many batches this rank makes of so many records."""
        parts = map(self._part, self._round_sizes(left))
        return sum(first < last for first, last in parts)

    def _order(self, position: Position, epoch: int) -> EpochOrder:
        start = epoch * self.total if self.remainder == "carry" else 0
        layout = self.layout_of(position, epoch)
        return EpochOrder(self.sizes, self.seed, epoch, layout, start, self.buckets)

    def _endless(self, position: Position) -> Iterator[Plan]:
        place = position.epoch * self.total + position.offset + self.rank * self.batch_size
        orders: dict[int, EpochOrder] = {}
        while True:
            wanted = np.arange(place, place + self.batch_size)
            epochs, offsets = np.divmod(wanted, self.total)
            needed = [int(epoch) for epoch in np.unique(epochs)]
            orders = {e: orders.get(e) or self._order(position, e) for e in needed}
            records = [orders[e].records(offsets[epochs == e]) for e in needed]
            upcoming = orders[needed[-1]].upcoming(int(offsets[-1])) if self.look_ahead else []
            yield Plan(epochs, np.concatenate(records), upcoming)
            place += self.round_size

    def _epoch(self, position: Position) -> Iterator[Plan]:
        sizes = self._round_sizes(self.total - position.offset)
        if not sizes:  # the position is an epoch's end
            position = Position(epoch=position.epoch + 1)
            sizes = self._round_sizes(self.total)
        order = self._order(position, position.epoch)
        place = position.offset
        for size in sizes:
            first, last = self._part(size)
            wanted = (place + np.arange(first, last)) % self.total
            place += size
            if first == last:
                continue
            upcoming = order.upcoming(int(wanted[-1])) if self.look_ahead else []
            epochs = np.full(len(wanted), position.epoch)
            yield Plan(epochs, order.records(wanted), upcoming)
