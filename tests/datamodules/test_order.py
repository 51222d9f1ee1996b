"""The order of an epoch as a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.order import EpochOrder, Layout

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=20)
LAYOUTS = st.builds(
    Layout,
    lanes=st.integers(1, 32),
    chunk=st.integers(1, 9),
    group_shards=st.integers(1, 5),
    shuffle=st.booleans(),
)


def whole(order: EpochOrder) -> list[tuple[int, int]]:
    return [(int(s), int(n)) for s, n in order.records(np.arange(order.total))]


@given(SIZES, LAYOUTS, st.integers(0, 10**6), st.booleans())
def test_an_epoch_holds_every_record_once(
    sizes: list[int], layout: Layout, start: int, bucketed: bool
) -> None:
    buckets = (lambda shard: np.arange(sizes[shard]) % 3) if bucketed else None
    found = whole(EpochOrder(sizes, 0, 1, layout, start, buckets))
    assert sorted(found) == [(s, n) for s, size in enumerate(sizes) for n in range(size)]


@given(SIZES, LAYOUTS, st.integers(0, 10**6), st.data())
def test_any_positions_can_be_asked_for_at_any_time(
    sizes: list[int], layout: Layout, start: int, data: st.DataObject
) -> None:
    order = EpochOrder(sizes, 0, 1, layout, start)
    wanted = data.draw(st.lists(st.integers(0, order.total - 1), min_size=1, max_size=8))
    found = EpochOrder(sizes, 0, 1, layout, start).records(np.array(wanted))
    assert [tuple(row) for row in found.tolist()] == [whole(order)[p] for p in wanted]


def test_the_order_depends_on_seed_and_epoch() -> None:
    sizes, layout = [7, 3, 12, 5, 1], Layout(lanes=2, chunk=4)
    first = whole(EpochOrder(sizes, 0, 0, layout))
    assert first == whole(EpochOrder(sizes, 0, 0, layout))
    assert first != whole(EpochOrder(sizes, 0, 1, layout))
    assert first != whole(EpochOrder(sizes, 1, 0, layout))


def test_records_of_one_shard_are_permuted_anew_each_epoch() -> None:
    def steps(epoch: int) -> list[int]:
        numbers = [n for _, n in whole(EpochOrder([50], 0, epoch, Layout(lanes=1, chunk=4)))]
        return [(n - numbers[0]) % 50 for n in numbers]  # wherever the ring was opened

    assert steps(0) != steps(1)


def test_each_lane_reads_shards_of_its_own() -> None:
    """With as many whole shards as divide evenly, lanes share at most those at their borders."""
    layout = Layout(lanes=4, chunk=10)
    order = EpochOrder([100] * 32, 0, 0, layout)
    found = np.array(whole(order))
    lane = np.arange(3200) // 10 % 4
    readers = [{int(x) for x in lane[found[:, 0] == shard]} for shard in range(32)]
    assert sum(len(lanes) == 1 for lanes in readers) >= 28
    assert max(map(len, readers)) <= 2


def test_lanes_stay_aligned_across_the_ends_of_epochs() -> None:
    layout, total = Layout(lanes=4, chunk=10), 3203
    for epoch in (1, 2, 3):
        order = EpochOrder([100] * 31 + [103], 0, epoch, layout, start=epoch * total)
        found = np.array(whole(order))
        lane = (np.arange(total) + epoch * total) // 10 % 4
        assert max(len(set(lane[found[:, 0] == shard])) for shard in range(32)) <= 2


def test_a_group_is_read_before_the_next_begins() -> None:
    order = EpochOrder([10] * 8, 0, 0, Layout(lanes=1, chunk=4, group_shards=2))
    shards = np.array([shard for shard, _ in whole(order)])
    spans = [int(np.ptp(np.flatnonzero(shards == shard))) for shard in range(8)]
    # All but the shard that the ring was opened inside, which is read first and last.
    assert sum(span < 20 for span in spans) >= 7
    mixed = [len(set(shards[i : i + 4].tolist())) for i in range(0, 80, 4)]
    assert sum(n > 1 for n in mixed) >= 12, "records of a group's shards are not mixed"


def test_what_comes_next_is_named_ahead() -> None:
    order = EpochOrder([10] * 8, 0, 0, Layout(lanes=2, chunk=5, group_shards=2))
    found = np.array(whole(order))
    lane = np.arange(80) // 5 % 2
    for position in range(80):
        later = found[(lane == lane[position]) & (np.arange(80) >= position), 0]
        expected = order.upcoming(position)
        assert set(expected) <= set(later.tolist())
    assert order.upcoming(79) == []
    assert order.upcoming(0)


@pytest.mark.parametrize("start", [0, 3, 64])
def test_buckets_fill_nearly_all_chunks(start: int) -> None:
    buckets = [np.random.default_rng(s).integers(0, 4, size=200) for s in range(6)]
    layout = Layout(lanes=2, chunk=8, group_shards=3)
    order = EpochOrder([200] * 6, 0, 0, layout, start, lambda shard: buckets[shard])
    found = np.array([buckets[s][n] for s, n in whole(order)])
    chunk = (np.arange(1200) + start) // 8
    mixed = sum(len(set(found[chunk == c])) > 1 for c in range(chunk.max() + 1))
    groups = 2 * 2
    assert mixed <= groups * (4 + 1)
    plain = np.array([buckets[s][n] for s, n in whole(EpochOrder([200] * 6, 0, 0, layout, start))])
    assert sum(len(set(plain[chunk == c])) > 1 for c in range(chunk.max() + 1)) > 140
