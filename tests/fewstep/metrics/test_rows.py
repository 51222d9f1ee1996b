from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.metrics import Ranks, Rows, Samples, numbers_of

from ranks import in_group, run_ranks


def table(numbers: Tensor, most: int | None = None, batch: int = 7) -> Rows:
    """Rows that hold ten times their own number."""
    rows = Rows(["features", "pixels"], most)
    for part in numbers.split(batch):
        values = 10.0 * part[:, None]
        rows.update({"features": values}, Samples(-values, part))
    return rows


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def test_rows_come_in_the_order_of_their_numbers() -> None:
    rows = table(shuffled(50))
    assert rows["features"].flatten().tolist() == [10.0 * n for n in range(50)]
    assert rows["pixels"].flatten().tolist() == [-10.0 * n for n in range(50)]


def test_a_bounded_table_keeps_the_smallest_numbers_and_little_memory() -> None:
    rows = table(shuffled(500), most=20)
    assert len(rows) <= 40 + 7
    assert rows["features"].flatten().tolist() == [10.0 * n for n in range(20)]


def by_rank(numbers: Tensor, cut: int, most: int | None) -> dict[str, Tensor]:
    ranks = Ranks()
    return table([numbers[:cut], numbers[cut:]][ranks.rank], most).merged(ranks).tensors()


@pytest.mark.parametrize(("cut", "most"), [(13, None), (40, None), (13, 25)])
def test_ranks_together_hold_what_one_process_holds(cut: int, most: int | None) -> None:
    numbers = shuffled(40)
    whole = table(numbers, most).tensors()
    for found in run_ranks(2, in_group, by_rank, numbers, cut, most):
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_keys_give_numbers_that_differ_and_do_not_change() -> None:
    keys = [f"record-{i}" for i in range(1000)]
    numbers = numbers_of(keys)
    assert numbers.dtype == torch.int64
    assert int(numbers.min()) >= 0
    assert len(set(numbers.tolist())) == 1000
    assert torch.equal(numbers[500:], numbers_of(keys[500:]))


def test_an_empty_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Rows(["features"]).tensors()
