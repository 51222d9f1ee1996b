"""The order of an epoch: a pure function of (seed, epoch, layout), computed only where it is read.

Shards are permuted and laid end to end, the line is closed to a ring, opened at a random place and
cut into *lanes* of equal length, one for each worker of each rank. Inside a lane, records are
permuted within groups of shards. Positions of the epoch go round the lanes, one batch each: so
every worker reads shards of its own, the global order is still one sequence that any number of
ranks can go on with, and finding a place in it costs the same at the beginning as at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewstep.seeding import numpy_generator

Integers = npt.NDArray[np.int64]
BucketsOf = Callable[[int], Integers]
GROUPS_KEPT = 2  # permutations of a lane kept at hand: the group being read and its neighbour


@dataclass(frozen=True)
class Layout:
    """How an epoch is dealt out.

    Attributes:
        lanes: number of workers of all ranks together.
        chunk: records a lane gives at a time: those of one rank's batch.
        group_shards: how many shards of a lane are mixed at a time.
        shuffle: whether anything is permuted at all.
    """

    lanes: int
    chunk: int
    group_shards: int = 16
    shuffle: bool = True


class EpochOrder:
    """The records of one epoch by position.

    Args:
        sizes: number of records of each shard.
        seed, epoch: the order's name.
        layout: how the epoch is dealt out.
        start: position of the epoch's first record in the whole stream. Batches that run across
            the ends of epochs thus stay aligned with the lanes.
        buckets: gives the bucket number of each record of a shard; batches are then made, as far
            as that is possible, of records of one bucket.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        epoch: int,
        layout: Layout,
        start: int = 0,
        buckets: BucketsOf | None = None,
    ) -> None:
        self.total = int(sum(sizes))
        self.seed, self.epoch, self.layout, self.buckets = seed, epoch, layout, buckets
        self.start = start % (layout.lanes * layout.chunk)
        generator = numpy_generator(seed, "shards", epoch)
        count = len(sizes)
        self.shards = generator.permutation(count) if layout.shuffle else np.arange(count)
        self.opening = int(generator.integers(self.total)) if layout.shuffle else 0
        laid = np.asarray(sizes, dtype=np.int64)[self.shards]
        # Twice round the ring, so that a lane never has to be split where the line was closed.
        self.ends = np.cumsum(np.concatenate([laid, laid]))
        self.begins = self.ends - np.concatenate([laid, laid])
        lanes = np.arange(layout.lanes)
        self.lane_sizes = self._steps(lanes, np.asarray(self.start + self.total))
        self.lane_starts = self.opening + np.cumsum(self.lane_sizes) - self.lane_sizes
        self._groups: OrderedDict[tuple[int, int], Integers] = OrderedDict()

    def records(self, positions: Integers) -> Integers:
        """(shard, number in the shard) of each position ``0 .. total - 1``: ``(n, 2)``."""
        positions = positions + self.start
        lanes = positions // self.layout.chunk % self.layout.lanes
        steps = self._steps(lanes, positions)
        places = np.empty_like(positions)
        for lane in np.unique(lanes):
            chosen = lanes == lane
            places[chosen] = self._places(int(lane), steps[chosen])
        return self._addresses(places)

    def upcoming(self, position: int) -> list[int]:
        """The shards that the lane of ``position`` reads next: those of its following group."""
        place = np.asarray(position + self.start)
        lane = int(place // self.layout.chunk % self.layout.lanes)
        step = int(self._steps(np.asarray(lane), place))
        bounds = self._bounds(lane)
        following = int(np.searchsorted(bounds, step, side="right"))
        if following + 1 >= len(bounds):
            return []
        first, last = self._span(lane, int(bounds[following]), int(bounds[following + 1]))
        return [int(self.shards[laid % len(self.shards)]) for laid in range(first, last)]

    # ------------------------------------------------------------------ lanes and groups

    def _addresses(self, places: Integers) -> Integers:
        laid = np.searchsorted(self.ends, places, side="right")
        return np.stack([self.shards[laid % len(self.shards)], places - self.begins[laid]], axis=1)

    def _steps(self, lanes: Integers, positions: Integers) -> Integers:
        """How many of the positions from the epoch's first up to these belong to each lane."""
        return self._before(lanes, positions) - self._before(lanes, np.asarray(self.start))

    def _before(self, lanes: Integers, positions: Integers) -> Integers:
        chunk = self.layout.chunk
        rounds, rest = np.divmod(positions, chunk * self.layout.lanes)
        return np.asarray(rounds * chunk + np.clip(rest - lanes * chunk, 0, chunk))

    def _span(self, lane: int, low: int, high: int) -> tuple[int, int]:
        """Which laid shards hold the steps ``low .. high - 1`` of a lane."""
        start = self.lane_starts[lane]
        first = np.searchsorted(self.ends, start + low, side="right")
        last = np.searchsorted(self.ends, start + high - 1, side="right")
        return int(first), int(last) + 1

    def _bounds(self, lane: int) -> Integers:
        """The steps of a lane at which its groups of shards begin, and its end."""
        size = int(self.lane_sizes[lane])
        if size == 0:
            return np.zeros(1, dtype=np.int64)
        first, last = self._span(lane, 0, size)
        ends = self.ends[first:last] - self.lane_starts[lane]
        inner = ends[self.layout.group_shards - 1 : -1 : self.layout.group_shards]
        return np.unique(np.concatenate([[0], inner, [size]]))

    def _places(self, lane: int, steps: Integers) -> Integers:
        """Where on the doubled line the steps of a lane are read."""
        bounds = self._bounds(lane)
        groups = np.searchsorted(bounds, steps, side="right") - 1
        places = np.empty_like(steps)
        for group in np.unique(groups):
            chosen = groups == group
            low, high = int(bounds[group]), int(bounds[group + 1])
            places[chosen] = self._permuted(lane, int(group), low, high)[steps[chosen] - low]
        return places + self.lane_starts[lane]

    def _permuted(self, lane: int, group: int, low: int, high: int) -> Integers:
        if not self.layout.shuffle:
            return np.arange(low, high)
        if (lane, group) not in self._groups:
            generator = numpy_generator(self.seed, "records", self.epoch, lane, group)
            order = low + generator.permutation(high - low)
            if self.buckets is not None:
                order = self._by_bucket(lane, order, low, high, generator)
            self._groups[lane, group] = order
            while len(self._groups) > GROUPS_KEPT * self.layout.lanes:
                self._groups.popitem(last=False)
        return self._groups[lane, group]

    # ------------------------------------------------------------------ buckets

    def _by_bucket(
        self, lane: int, order: Integers, low: int, high: int, generator: np.random.Generator
    ) -> Integers:
        """Rearranges a group so that its chunks hold one bucket each.

        What does not fill a chunk shares mixed ones: fewer than there are buckets in a group, and
        the two at its ends, which it shares with its neighbours.
        """
        chunk = self.layout.chunk
        # Chunks are cut where the stream's batches are: a lane's first may be the rest of one.
        head = -self.start % chunk if self.start // chunk == lane else 0
        lead = min((head - low) % chunk, high - low)
        slots = (high - low - lead) // chunk
        buckets = self._buckets_of(self._addresses(order + self.lane_starts[lane]))
        whole: list[Integers] = []
        rest: list[Integers] = []
        for bucket in np.unique(buckets):
            members = order[buckets == bucket]
            cut = len(members) // chunk * chunk
            whole += list(members[:cut].reshape(-1, chunk))
            rest.append(members[cut:])
        whole = [whole[number] for number in generator.permutation(len(whole))]
        left = np.concatenate([*whole[slots:], *rest])
        mixed = (slots - len(whole[:slots])) * chunk
        chunks = [*whole[:slots], *left[:mixed].reshape(-1, chunk)]
        left = left[mixed:]
        inner = [chunks[number] for number in generator.permutation(slots)]
        return np.concatenate([left[:lead], *inner, left[lead:]])

    def _buckets_of(self, addresses: Integers) -> Integers:
        assert self.buckets is not None
        found = np.empty(len(addresses), dtype=np.int64)
        for shard in np.unique(addresses[:, 0]):
            chosen = addresses[:, 0] == shard
            found[chosen] = self.buckets(int(shard))[addresses[chosen, 1]]
        return found
