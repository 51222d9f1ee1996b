from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics import Means, Ranks, Samples

from ranks import in_group, run_ranks


def both(features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
    return [samples.pixels[:, 0], features["features"][:, 0]]


def means(*batches: Tensor) -> Means:
    found = Means(["first", "second"], both)
    for batch in batches:
        found.update({"features": 2 * batch}, Samples(batch, torch.arange(len(batch))))
    return found


def test_means_are_over_samples_and_not_over_batches() -> None:
    values = torch.tensor([[1.0], [2.0], [6.0]])
    assert means(values[:1], values[1:]).means() == {"first": 3.0, "second": 6.0}


def test_sums_are_of_double_precision() -> None:
    values = torch.full((100, 1), 0.1)
    found = means(*([values] * 100)).means()["first"]
    assert found == pytest.approx(float(values[0].double()), rel=1e-14)


def by_rank(values: Tensor, rows: int) -> dict[str, float]:
    ranks = Ranks()
    mine = [values[:rows], values[rows:]][ranks.rank]
    return means(*([mine] if len(mine) else [])).merged(ranks).means()


@pytest.mark.parametrize("rows", [3, 10])
def test_ranks_together_have_the_mean_of_all_even_if_one_has_none(rows: int) -> None:
    values = torch.arange(10.0)[:, None]
    found = run_ranks(2, in_group, by_rank, values, rows)
    assert found == [{"first": 4.5, "second": 9.0}] * 2


def test_stored_sums_give_the_same_means_again() -> None:
    first, again = means(torch.arange(5.0)[:, None]), means()
    again.restore(first.tensors())
    assert again.means() == first.means() == {"first": 2.0, "second": 4.0}


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(FewstepError, match="no samples"):
        means().means()
    with pytest.raises(ValueError, match="no samples"):
        means().tensors()
