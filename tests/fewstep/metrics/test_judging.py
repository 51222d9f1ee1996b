from __future__ import annotations

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.metrics.judging import (
    accuracy,
    nearest_distance_ratio,
    nearest_distances,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_accuracy_is_the_share_of_samples_whose_label_has_the_largest_logit() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [1.0, 0.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 2, 2, 0])) == 0.75


def test_logits_that_are_not_finite_are_wrong() -> None:
    logits = torch.tensor([[torch.inf, 1.0], [torch.nan, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert accuracy(logits, torch.zeros(4).long()) == 0.5


def test_distances_are_those_to_the_nearest_datum_of_all_blocks() -> None:
    samples, data = randn(30, 2, 3), randn(5000, 2, 3, seed=1)  # more than one block of columns
    every = torch.cdist(samples.flatten(1).double(), data.flatten(1).double())
    torch.testing.assert_close(nearest_distances(samples, data), every.amin(1))
    assert every.argmin(1).max() > 4096
    assert nearest_distances(data[-3:], data).max() == 0


def test_the_ratio_is_one_for_data_and_tells_copies_and_what_is_far_away() -> None:
    data, held_out = randn(2000, 4), randn(1000, 4, seed=1)
    assert nearest_distance_ratio(randn(1000, 4, seed=2), data, held_out) == pytest.approx(
        1, abs=0.1
    )
    assert nearest_distance_ratio(data[:500], data, held_out) == 0
    assert nearest_distance_ratio(5 * held_out, data, held_out) > 3


def test_the_ratio_does_not_depend_on_the_unit() -> None:
    rows = randn(20, 3), randn(50, 3, seed=1), randn(20, 3, seed=2)
    torch.testing.assert_close(
        nearest_distance_ratio(*rows),
        nearest_distance_ratio(*(100 * r for r in rows)),
        rtol=1e-5,
        atol=0,
    )


def test_what_cannot_be_measured_is_refused_with_advice() -> None:
    data = randn(5, 2)
    with pytest.raises(FewstepError, match="Give data that are not"):
        nearest_distance_ratio(data, data, data[:3])
    with pytest.raises(FewstepError, match="samples of one shape"):
        nearest_distances(randn(5, 3), data)
    with pytest.raises(FewstepError, match="a label for each sample"):
        accuracy(randn(3, 2), torch.zeros(2).long())
