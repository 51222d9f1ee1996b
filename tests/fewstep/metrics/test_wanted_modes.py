"""Wanted modes of mixtures, by samples whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.analytic import GaussianMixture
from fewstep.errors import FewstepError
from fewstep.metrics import Samples, WantedModes

from metric_cases import measured

MIXTURE = GaussianMixture(
    torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.2, 0.3])
)


def found(x: Tensor, labels: Tensor, size: int = 7) -> dict[str, float]:
    numbers = torch.arange(len(x)).split(size)
    made = [Samples(x[n], n, cond={"class_labels": labels[n]}) for n in numbers]
    return measured(WantedModes(MIXTURE), made)


def drawn(count: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=draws)
    noise = torch.randn(count, 2, generator=draws)
    return MIXTURE.means[labels] + spread * MIXTURE.stds[labels, None] * noise, labels


def test_exact_samples_are_right_and_scatter_by_one() -> None:
    values = found(*drawn(20_000))
    assert values["mode_accuracy"] > 0.999
    assert values["mode_scatter"] == pytest.approx(1, abs=0.02)
    assert values["mode_scatter_error"] == abs(math.log(values["mode_scatter"]))


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_samples_that_crowd_or_leave_are_told_from_exact_ones(spread: float) -> None:
    values = found(*drawn(20_000, spread))
    assert values["mode_scatter"] == pytest.approx(spread**2, rel=0.03)


def test_samples_of_other_classes_count_as_misses_and_in_nothing_else() -> None:
    x, labels = drawn(400)
    values = found(x, labels)
    half = torch.arange(400) < 200
    missed = found(x, torch.where(half, labels, (labels + 1) % 3))
    assert missed["mode_accuracy"] == pytest.approx(0.5, abs=0.01)
    assert missed["mode_scatter"] == pytest.approx(found(x[:200], labels[:200])["mode_scatter"])
    assert values["mode_accuracy"] > 0.99
    assert found(x, (labels + 1) % 3) == {"mode_accuracy": pytest.approx(0, abs=0.01)}


def test_samples_that_are_no_numbers_reach_nothing() -> None:
    x = torch.tensor([[torch.nan, torch.nan], [torch.inf, torch.inf], [0.1, 0.0]])
    values = found(x, torch.zeros(3, dtype=torch.long))
    assert values["mode_accuracy"] == pytest.approx(1 / 3)
    assert values["mode_scatter"] == pytest.approx(0.1**2 / 0.5**2 / 2)


def test_classes_of_several_components_are_reached_in_any_of_them() -> None:
    two = GaussianMixture(MIXTURE.means, MIXTURE.stds, labels=torch.tensor([0, 1, 1]))
    x, labels = drawn(200)
    made = [Samples(x, torch.arange(200), cond={"class_labels": labels.clamp_max(1)})]
    assert measured(WantedModes(two), made)["mode_accuracy"] > 0.99


def test_samples_without_classes_or_of_other_dimensions_are_refused() -> None:
    with pytest.raises(FewstepError, match="were not given"):
        measured(WantedModes(MIXTURE), [Samples(torch.zeros(3, 2), torch.arange(3))])
    with pytest.raises(FewstepError, match="mixture in 2 dimensions"):
        found(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
