from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.metrics import Ranks, Rows, Samples, numbers_of
from fewstep.metrics.rows import _kept

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


class Watched(Ranks):
    """Ranks that note how many rows they are given, and how much travels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []
        self.at_once: list[int] = []
        self._gather: Any = dist.gather

    def gather(self, piece: Tensor, *args: Any, **options: Any) -> None:
        """Stands in for PyTorch's."""
        self.at_once.append(piece.nbytes * self.size)
        self._gather(piece, *args, **options)

    def rows(self, tensor: Tensor | None) -> Tensor | None:
        self.given.append(0 if tensor is None else len(tensor))
        return super().rows(tensor)


def by_rank(
    numbers: Tensor, cut: int, most: int | None
) -> tuple[dict[str, Tensor] | None, list[int], list[int]]:
    ranks = Watched()
    mine = table([numbers[:cut], numbers[cut:]][ranks.rank], most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "gather", ranks.gather)
        rows = mine.merged(ranks)
    return rows.tensors() if len(rows) else None, ranks.given, ranks.at_once


@pytest.mark.parametrize("piece", [100, 2**26])
@pytest.mark.parametrize(("cut", "most"), [(13, None), (40, None), (0, 25), (13, 25)])
def test_the_first_rank_holds_what_one_process_holds(
    cut: int, most: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.metrics.ranks.PIECE", piece)
    numbers = shuffled(40)
    whole = table(numbers, most).tensors()
    (found, *first), (nothing, *second) = run_ranks(2, in_group, by_rank, numbers, cut, most)
    assert nothing is None
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    for (given, at_once), own in zip((first, second), (numbers[:cut], numbers[cut:]), strict=True):
        expected = len(own) if most is None else int((own < most).sum())
        assert given == [expected] * 3, "rows beyond the cut travelled"
        assert max(at_once) <= piece


def of_types(ranks_rows: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    ranks = Ranks()
    mine = ranks_rows[ranks.rank]
    found = {name: ranks.rows(tensor) for name, tensor in mine.items()}
    return None if ranks.rank else {n: t for n, t in found.items() if t is not None}


def test_rows_of_every_type_and_shape_arrive_as_they_were() -> None:
    types = (torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.int64)
    sent = [
        {
            str(t): (100 * torch.rand(n, *shape)).to(t)
            for t, shape in zip(types, shapes, strict=True)
        }
        for n, shapes in ((3, [(), (2,), (5,), (3, 2), (), (1,)]),) * 2
    ]
    sent[1] = {name: tensor[:2] for name, tensor in sent[1].items()}
    first, _ = run_ranks(2, in_group, of_types, sent)
    for name, tensor in first.items():
        assert torch.equal(tensor, torch.cat([sent[0][name], sent[1][name]]))


def test_equal_numbers_are_cut_as_if_ranks_followed_one_another() -> None:
    assert _kept([[1, 5, 5], [], [0, 5]], 3) == [2, 0, 1]
    assert _kept([[1, 5, 5], [], [0, 5]], 4) == [3, 0, 1]
    assert _kept([[1], [2]], None) == [1, 1]
    assert _kept([[1], [2]], 5) == [1, 1]


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
