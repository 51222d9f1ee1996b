from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from fewstep.errors import FewstepError
from fewstep.metrics import (
    Consistency,
    Features,
    Metric,
    PairedDistance,
    PairedPSNR,
    Samples,
    to_uint8,
)

from metric_cases import batches, measured, measured_by_ranks, noise


class Flat(Features):
    """Images as their own features, videos' frames as theirs."""

    name = "flat"

    prepare = load = lambda *given: None

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        pixels = samples.pixels
        video = pixels.ndim == 5
        return {"features": pixels.transpose(1, 2).flatten(2) if video else pixels.flatten(1)}

    def protocol(self) -> dict[str, Any]:
        return {"name": "flat"}


METRICS: list[Metric] = [Consistency(Flat()), PairedPSNR(), PairedDistance()]


def test_equal_pairs_are_consistent_and_at_no_distance() -> None:
    for pixels in (noise(5, 3, 8, 8), noise(5, 3, 4, 8, 8)):
        same = batches(pixels), batches(pixels.clone(), 2)
        assert measured(Consistency(Flat()), *same) == {"consistency_flat": pytest.approx(1)}
        assert measured(PairedDistance(), *same) == {"paired_rmse": 0.0}
        steps = 10 * torch.log10(torch.tensor(255.0**2 * pixels[0].numel()))
        assert measured(PairedPSNR(), *same)["paired_psnr"] == pytest.approx(float(steps))


def test_unrelated_gaussian_features_have_hardly_any_consistency() -> None:
    rows = [
        torch.randn(200, 2000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    found = measured(Consistency(Flat()), batches(rows[0]), batches(rows[1]))
    assert abs(found["consistency_flat"]) < 4 / (200 * 2000) ** 0.5  # four standard errors


def test_consistency_of_videos_is_the_mean_over_frames_and_pairs() -> None:
    first, second = torch.zeros(2, 2, 2, 1, 1), torch.zeros(2, 2, 2, 1, 1)
    first[:, 0] = 1
    second[0, :, 0, 0, 0] = torch.tensor([3.0, 4.0])  # a cosine of 0.6
    second[0, :, 1, 0, 0] = torch.tensor([0.0, 1.0])  # of 0
    second[1, :, 0, 0, 0] = torch.tensor([2.0, 0.0])  # of 1
    second[1, :, 1, 0, 0] = torch.tensor([-4.0, 3.0])  # of -0.8
    found = measured(Consistency(Flat()), batches(first), batches(second))
    assert found["consistency_flat"] == pytest.approx((0.6 + 0 + 1 - 0.8) / 4)


def test_peak_signal_to_noise_is_torchmetrics_mean_over_images() -> None:
    first = noise(6, 3, 8, 8)
    second = (first + 0.3 * noise(6, 3, 8, 8, seed=1) * torch.rand(6, 1, 1, 1)).clamp(-1, 1)
    expected = peak_signal_noise_ratio(
        to_uint8(first).double(),
        to_uint8(second).double(),
        data_range=255.0,
        reduction="elementwise_mean",
        dim=(1, 2, 3),
    )
    found = measured(PairedPSNR(), batches(first), batches(second))
    assert found["paired_psnr"] == pytest.approx(float(expected), rel=1e-6)


def test_black_and_white_are_a_distance_of_one() -> None:
    black, white = -torch.ones(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    assert measured(PairedDistance(), batches(black), batches(white)) == {"paired_rmse": 1.0}
    half = white.clone()
    half[:, :, :2] = -1  # a quarter of the rows
    found = measured(PairedDistance(), batches(white), batches(half))
    assert found["paired_rmse"] == pytest.approx(0.5)


@pytest.mark.parametrize("metric", METRICS)
def test_pairs_are_found_by_number_in_whatever_order_they_come(metric: Metric) -> None:
    first, second = noise(7, 3, 8, 8), noise(7, 3, 8, 8, seed=1)
    expected = measured(metric, batches(first), batches(second))
    order = [3, 6, 0, 5, 1, 2, 4]
    assert measured(metric, batches(first, 2, order=order), batches(second)) == expected
    wrong = measured(metric, batches(first), batches(second[order]))
    assert wrong != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_together_say_what_one_process_says(metric: Metric) -> None:
    sets = batches(noise(7, 3, 8, 8), 2), batches(noise(7, 3, 8, 8, seed=1))
    whole = measured(metric, *sets)
    assert measured_by_ranks(metric, *sets) == [whole]


def test_only_so_many_pairs_are_kept_and_compared() -> None:
    first, second = noise(300, 3, 8, 8), noise(300, 3, 8, 8, seed=1)
    metric = PairedDistance(pairs=16)
    found = measured(metric, batches(first), batches(second))
    assert found == measured(metric, batches(first[:16]), batches(second[:16]))
    assert found != measured(PairedDistance(pairs=17), batches(first), batches(second))
    statistics = metric.statistics()
    for batch in batches(first):
        statistics.update({}, batch)
        assert len(statistics) <= 2 * 16 + 3
    assert statistics.tensors()["uint8"].dtype == torch.uint8


def test_sets_that_are_no_pairs_are_an_error() -> None:
    first = noise(6, 3, 8, 8)
    with pytest.raises(FewstepError, match="5 and 6 samples"):
        measured(PairedPSNR(), batches(first[:5]), batches(first))
    others = [Samples(first, torch.arange(6) + 1)]
    with pytest.raises(FewstepError, match="different numbers"):
        measured(PairedPSNR(), batches(first), others)
    with pytest.raises(FewstepError, match="one shape"):
        measured(PairedPSNR(), batches(first), batches(noise(6, 3, 4, 4)))
    with pytest.raises(FewstepError, match="vectors"):
        measured(PairedPSNR(), batches(noise(6, 2)), batches(noise(6, 2)))


def test_they_ask_for_pairs_and_say_how_many_they_compare() -> None:
    for metric in METRICS:
        assert metric.reference == "pairs"
        assert metric.protocol()["pairs"] == metric.pairs == 256
    assert Consistency(Flat()).protocol()["features"] == {"name": "flat"}
