"""The order of a stream as a pure function."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from datamodules.order import EndlessBatches, FiniteBatches, epoch_order

SIZES = [7, 3, 12, 5, 1]


def test_an_epoch_holds_every_record_once() -> None:
    for group in (1, 2, 64):
        order = epoch_order(SIZES, seed=3, epoch=1, shards_per_group=group)
        assert sorted(order.tolist()) == list(range(sum(SIZES)))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = epoch_order(SIZES, 0, 0)
    assert np.array_equal(first, epoch_order(SIZES, 0, 0))
    assert not np.array_equal(first, epoch_order(SIZES, 0, 1))
    assert not np.array_equal(first, epoch_order(SIZES, 1, 0))


def test_groups_keep_their_shards_together() -> None:
    order = epoch_order([10] * 6, 0, 0, shards_per_group=2)
    for start in range(0, 60, 20):
        assert len({int(n) // 10 for n in order[start : start + 20]}) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_ranks_together_see_every_record_once_an_epoch(
    world_size: int, batch_size: int
) -> None:
    total = sum(SIZES)
    num_batches = total * 3  # this many batches a rank are whole epochs for every layout
    seen: list[int] = []
    for rank in range(world_size):
        batches = EndlessBatches(SIZES, batch_size, 0, rank, world_size)
        for batch in islice(batches, num_batches):
            assert len(batch) == batch_size
            seen += batch
    counts = np.bincount(seen, minlength=total)
    assert (counts == counts[0]).all()


def test_the_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    whole = next(iter(EndlessBatches(SIZES, 12, 0)))
    parts = [next(iter(EndlessBatches(SIZES, 4, 0, rank, 3))) for rank in range(3)]
    assert [number for part in parts for number in part] == whole


@pytest.mark.parametrize("consumed", [1, 5, 28, 400])
def test_a_stream_begun_in_the_middle_goes_on_as_the_undisturbed_one(consumed: int) -> None:
    batches = list(islice(EndlessBatches(SIZES, 4, 0), consumed + 10))
    again = list(islice(EndlessBatches(SIZES, 4, 0, start=4 * consumed), 10))
    assert again == batches[consumed:]


def test_finite_batches_hold_everything_once_over_all_ranks() -> None:
    for world_size in (1, 2, 5):
        parts = [list(FiniteBatches(23, 4, rank, world_size)) for rank in range(world_size)]
        assert sorted(n for part in parts for batch in part for n in batch) == list(range(23))
        assert [len(FiniteBatches(23, 4, r, world_size)) for r in range(world_size)] == [
            len(part) for part in parts
        ]
