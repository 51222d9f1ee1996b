"""Guides and judges: what each says of samples, and that neither is the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics import ClassAccuracy, GuideAndJudge, NearestDataDistance, Samples, collect
from fewstep.metrics.digit_readers import PARTS, part_of_digits

NUMBERS = torch.arange(4)


class Shifted(nn.Module):
    """Says that a sample's class is its largest element, so many places on."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.tensor(float(places)))

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(int(self.places), 1)


def accuracies(samples: Tensor, labels: Tensor, places: int = 1) -> dict[str, float]:
    metric = ClassAccuracy(GuideAndJudge(Shifted(0), Shifted(places)))
    (found,) = collect([metric], [Samples(samples, NUMBERS, cond={"class_labels": labels})])
    return metric.compute(found, None)


def test_each_network_is_asked_about_the_class_that_was_wanted() -> None:
    samples = torch.eye(4)
    right = torch.tensor([0, 1, 2, 3])
    assert accuracies(samples, right) == {
        "guide_accuracy": 1.0,
        "judge_accuracy": 0.0,
        "guide_judge_gap": 1.0,
    }
    half = torch.tensor([0, 1, 3, 0])  # the judge sees one place further
    assert accuracies(samples, half) == {
        "guide_accuracy": 0.5,
        "judge_accuracy": 0.5,
        "guide_judge_gap": 0.0,
    }


def test_samples_without_a_wanted_class_are_refused() -> None:
    metric = ClassAccuracy(GuideAndJudge(Shifted(0), Shifted(1)))
    with pytest.raises(FewstepError, match="'class_labels', which these samples were not given"):
        collect([metric], [Samples(torch.eye(4), NUMBERS)])


def test_a_copy_of_the_guide_is_no_judge() -> None:
    with pytest.raises(FewstepError, match="one network as guide and judge"):
        GuideAndJudge(Shifted(2), Shifted(2))


def test_a_metric_names_the_networks_that_may_not_and_those_that_must_have_guided() -> None:
    pair = GuideAndJudge(Shifted(0), Shifted(1))
    metric = ClassAccuracy(pair)
    assert metric.guides() == [pair.networks["guide"]]
    assert metric.judges() == [pair.networks["judge"]]
    assert NearestDataDistance().judges() == NearestDataDistance().guides() == []


def test_readers_of_digits_have_seen_no_digit_in_common() -> None:
    images = [part_of_digits(part)[0].flatten(1) for part in PARTS]
    assert [len(part) for part in images] == [599, 599, 599]
    together = torch.cat(images)
    rows = {tuple(row) for row in together.tolist()}
    assert len(rows) == len(together)  # no two digits are alike at all


def test_samples_among_the_data_are_as_near_as_unseen_data_and_others_further() -> None:
    draws = torch.Generator().manual_seed(0)
    real, own = torch.randn(2, 400, 3, generator=draws)
    metric = NearestDataDistance()
    numbers = torch.arange(400)
    (reference,) = collect([metric], [Samples(real, numbers)])
    ratios = []
    for samples in (own, real, own + 3):
        (found,) = collect([metric], [Samples(samples, numbers)])
        ratios.append(metric.compute(found, reference)["nearest_data_ratio"])
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert ratios[1] == pytest.approx(0.5, abs=0.05)  # every second of them is a datum
    assert ratios[2] > 3
