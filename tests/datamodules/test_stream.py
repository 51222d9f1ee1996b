"""Streams of batches: exactly once, evenly over ranks, resumed anywhere."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datamodules.stream import Plan, Position, Remainder, Stream
from fewstep.errors import FewstepError

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)
RANKS = st.integers(1, 8)
WORKERS = st.integers(0, 4)
BATCH = st.integers(1, 7)

Address = tuple[int, int, int]


def addresses(plans: list[Plan]) -> list[Address]:
    return [
        (int(e), int(s), int(n))
        for plan in plans
        for e, (s, n) in zip(plan.epochs, plan.records, strict=True)
    ]


def epoch_of(sizes: list[int], epoch: int) -> list[Address]:
    return [(epoch, s, n) for s, size in enumerate(sizes) for n in range(size)]


def ranks(sizes: list[int], batch: int, world: int, **options: object) -> list[Stream]:
    return [Stream(sizes, batch, 0, rank, world, **options) for rank in range(world)]  # type: ignore[arg-type]


@given(SIZES, BATCH, RANKS, WORKERS)
@pytest.mark.slow
def test_endless_streams_hold_every_record_once_an_epoch(
    sizes: list[int], batch: int, world: int, workers: int
) -> None:
    total = sum(sizes)
    updates = -(-3 * total // (batch * world))
    streams = ranks(sizes, batch, world, num_workers=workers)
    plans = [list(islice(stream, updates)) for stream in streams]
    assert all(len(plan.records) == batch for part in plans for plan in part)
    seen = addresses([plan for part in plans for plan in part])
    assert len(seen) == len(set(seen))
    for epoch in range(3):
        assert set(epoch_of(sizes, epoch)) <= set(seen)


@given(SIZES, BATCH, RANKS, WORKERS, st.sampled_from(["share", "drop"]), st.integers(0, 3))
def test_finite_epochs_hold_every_record_at_most_once_in_equally_many_batches(
    sizes: list[int], batch: int, world: int, workers: int, remainder: Remainder, epoch: int
) -> None:
    options = {
        "num_workers": workers,
        "remainder": remainder,
        "position": lambda: Position(epoch),
    }
    try:
        streams = ranks(sizes, batch, world, **options)
    except FewstepError:
        too_few = sum(sizes) < batch * world
        assert too_few or (remainder == "share" and sum(sizes) % (batch * world) < world)
        return
    plans = [list(stream) for stream in streams]
    assert {len(part) for part in plans} == {len(streams[0])}
    assert all(1 <= len(plan.records) <= batch for part in plans for plan in part)
    seen = addresses([plan for part in plans for plan in part])
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(epoch_of(sizes, epoch))
    left_out = sum(sizes) % (batch * world) if remainder == "drop" else 0
    assert len(seen) == sum(sizes) - left_out


@given(SIZES, BATCH, st.integers(1, 64), WORKERS)
def test_ranks_read_everything_once_though_some_have_nothing_to_read(
    sizes: list[int], batch: int, world: int, workers: int
) -> None:
    streams = ranks(sizes, batch, world, num_workers=workers, remainder="uneven", shuffle=False)
    plans = [list(stream) for stream in streams]
    assert [len(part) for part in plans] == [len(stream) for stream in streams]
    assert max(map(len, plans)) - min(map(len, plans)) <= 1
    assert all(1 <= len(plan.records) <= batch for part in plans for plan in part)
    seen = addresses([plan for part in plans for plan in part])
    assert sorted(seen) == epoch_of(sizes, 0)


@given(SIZES, BATCH, st.integers(1, 64), WORKERS)
@pytest.mark.slow
def test_records_are_repeated_only_to_fill_the_last_round(
    sizes: list[int], batch: int, world: int, workers: int
) -> None:
    streams = ranks(sizes, batch, world, num_workers=workers, remainder="repeat", shuffle=False)
    plans = [list(stream) for stream in streams]
    assert {len(part) for part in plans} == {len(streams[0])}
    assert all(1 <= len(plan.records) <= batch for part in plans for plan in part)
    seen = addresses([plan for part in plans for plan in part])
    assert set(seen) == set(epoch_of(sizes, 0))
    repeated = len(seen) - sum(sizes)
    assert repeated < world
    if repeated:
        assert all(len(part[-1].records) == 1 for part in plans)


def test_any_number_of_ranks_reads_single_records() -> None:
    for remainder, batches in (("repeat", 16 * 64), ("uneven", 1000)):
        streams = ranks([1000], 1, 64, remainder=remainder, shuffle=False)
        assert sum(len(list(stream)) for stream in streams) == batches


@given(SIZES, BATCH, RANKS, WORKERS, st.sampled_from(["carry", "drop"]))
def test_same_seed_same_order_other_epoch_other_order(
    sizes: list[int], batch: int, world: int, workers: int, remainder: Remainder
) -> None:
    assume(sum(sizes) >= max(40, batch * world))
    updates = sum(sizes) // (batch * world)

    def first(seed: int, epoch: int) -> list[tuple[int, int]]:
        position = lambda: Position(epoch)  # noqa: E731
        stream = Stream(
            sizes, batch, seed, 0, world, workers, remainder=remainder, position=position
        )
        return [(s, n) for _, s, n in addresses(list(islice(stream, updates)))]

    assume(updates * batch >= 10)
    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1)
    assert first(0, 0) != first(1, 0)


@given(SIZES, BATCH, RANKS, WORKERS, st.sampled_from(["carry", "drop"]), st.integers(0, 60))
def test_a_stream_begun_anywhere_goes_on_as_the_undisturbed_one(
    sizes: list[int], batch: int, world: int, workers: int, remainder: Remainder, done: int
) -> None:
    assume(sum(sizes) >= batch * world)
    options = {"num_workers": workers, "remainder": remainder}

    def run(stream: Stream, batches: int) -> list[Address]:
        """Epoch after epoch, as a trainer reads it."""
        plans: list[Plan] = []
        while len(plans) < batches:
            position = stream.after(Position(), len(plans))
            again = Stream(sizes, batch, 0, world - 1, world, **options, position=lambda: position)  # type: ignore[arg-type]  # noqa: B023
            plans += list(islice(again, batches - len(plans)))
        return addresses(plans)

    stream = Stream(sizes, batch, 0, world - 1, world, **options)  # type: ignore[arg-type]
    undisturbed = run(stream, done + 3)
    position = stream.after(Position(), done)
    resumed = Stream(
        sizes,
        batch,
        0,
        world - 1,
        world,
        **options,  # type: ignore[arg-type]
        position=lambda: Position.restored(position.state()),
    )
    found = addresses(list(islice(resumed, 1)))
    assert found == undisturbed[done * batch : (done + 1) * batch]


@given(SIZES, st.lists(st.tuples(BATCH, RANKS, WORKERS, st.integers(0, 9)), min_size=2, max_size=5))
def test_a_stream_resumed_again_and_again_on_other_layouts_loses_and_repeats_nothing(
    sizes: list[int], runs: list[tuple[int, int, int, int]]
) -> None:
    position = Position()
    seen: list[Address] = []
    for batch, world, workers, updates in runs:
        streams = ranks(sizes, batch, world, num_workers=workers, position=lambda: position)  # noqa: B023
        for stream in streams:
            seen += addresses(list(islice(stream, updates)))
        position = Position.restored(streams[0].after(position, updates).state())
    assert len(seen) == len(set(seen))
    consumed = position.epoch * sum(sizes) + position.offset
    assert len(seen) == consumed
    for epoch in range(position.epoch):
        assert set(epoch_of(sizes, epoch)) <= set(seen)


@pytest.mark.parametrize("remainder", ["share", "drop"])
def test_a_finite_epoch_is_finished_on_other_ranks(remainder: Remainder) -> None:
    sizes = [11, 7, 13, 9]
    begun = ranks(sizes, 3, 2, num_workers=1, remainder=remainder)
    seen = [a for stream in begun for a in addresses(list(islice(stream, 4)))]
    position = begun[0].after(Position(), 4)
    resumed = ranks(sizes, 2, 3, remainder=remainder, position=lambda: position)
    seen += [a for stream in resumed for a in addresses(list(stream))]
    assert len(seen) == len(set(seen))
    assert len(seen) == (40 if remainder == "share" else 24 + 16 // 6 * 6)
    assert len(resumed[0]) >= 4 + len(list(resumed[0]))


def test_the_next_epoch_has_the_new_layout() -> None:
    sizes = [20] * 5
    old = Stream(sizes, 4, 0, 0, 1, num_workers=3)
    position = old.after(Position(), 10)
    new = Stream(sizes, 4, 0, 0, 2, num_workers=1)
    assert new.layout_of(position, 0) == old.layout
    assert new.layout_of(position, 1) == new.layout
    assert new.after(position, 1).layout == old.layout
    assert new.after(position, 20).layout == new.layout


def test_a_whole_batch_of_one_worker_comes_from_its_own_lane() -> None:
    """Worker w of rank r takes every num_workers-th batch: it must find its own shards there."""
    world, workers = 2, 3
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank in range(world):
        stream = Stream([40] * 24, 8, 0, rank, world, workers, group_shards=2)
        for number, plan in enumerate(islice(stream, 40)):
            for shard in np.unique(plan.records[:, 0]):
                readers.setdefault(int(shard), set()).add((rank, number % workers))
    assert max(map(len, readers.values())) <= 2
    assert np.mean([len(r) for r in readers.values()]) < 1.4


def test_data_that_cannot_be_divided_says_what_to_do() -> None:
    with pytest.raises(FewstepError, match="Lower batch_size, or set remainder"):
        Stream([5], 4, 0, 0, 2, remainder="drop")
    with pytest.raises(FewstepError, match="Use fewer devices"):
        Stream([3], 4, 0, 0, 4, remainder="share")
    with pytest.raises(TypeError):
        len(Stream([3], 4, 0))
