from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics

from fewstep.errors import FewstepError
from fewstep.metrics import (
    FID,
    KID,
    SFID,
    FrameFID,
    GaussianStatistics,
    InceptionFeatures,
    InceptionScore,
    Metric,
    PrecisionRecall,
    Rows,
    Statistics,
    collect,
)

from metric_cases import batches

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"subsets": 10, "subset_size": 5}


def pictures(count: int, seed: int, contrast: float) -> Tensor:
    """8-bit pictures ``(N, 3, 32, 40)``, smooth ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (32, 40), mode="bilinear")
    return (contrast * 255 * fine).round().to(torch.uint8)


class Pictures(Dataset[Tensor]):
    """A set as torch-fidelity takes it."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def by_torch_fidelity(generated: Tensor, real: Tensor, weights: Path) -> dict[str, float]:
    return calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(real),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        kid_subsets=OPTIONS["subsets"],
        kid_subset_size=OPTIONS["subset_size"],
        isc_splits=2,
        batch_size=4,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )


class Measured:
    """Two sets of pictures, and what both sides say of them."""

    def __init__(self, count: int, weights: Path) -> None:
        self.images = pictures(count, 0, 0.9), pictures(count, 1, 1.0)
        features = InceptionFeatures(str(weights), batch_size=5)
        features.load(CPU)
        self.metrics: list[Metric] = [
            FID(features),
            KID(features, **OPTIONS),
            InceptionScore(features, splits=2),
            PrecisionRecall(features),
            SFID(features),
        ]
        self.statistics = [
            collect(self.metrics, batches(images.float() / 127.5 - 1, 7)) for images in self.images
        ]
        self.theirs = by_torch_fidelity(*self.images, weights)

    def value(self, number: int) -> dict[str, float]:
        sides = [side[number] for side in self.statistics]
        return self.metrics[number].compute(*sides)


@pytest.fixture(scope="module")
def few(inception_weights: Path) -> Measured:
    return Measured(6, inception_weights)


def agrees(found: Measured) -> None:
    ours = {**found.value(0), **found.value(1), **found.value(2), **found.value(3)}
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(found.theirs[theirs], rel=1e-4, abs=1e-5), name
    assert ours["fid"] > 0.1
    assert ours["kid"] > 10 * 1e-5
    assert ours["inception_score"] > 1.005


@pytest.mark.slow
def test_all_metrics_agree_with_torch_fidelity_on_the_same_images(few: Measured) -> None:
    agrees(few)


@pytest.mark.slow
def test_all_metrics_agree_with_torch_fidelity_on_more_images(inception_weights: Path) -> None:
    agrees(Measured(48, inception_weights))


@pytest.mark.slow
def test_fid_agrees_with_torchmetrics(few: Measured, inception_weights: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(
        feature_extractor_weights_path=str(inception_weights), antialias=False
    )
    for images, real in zip(few.images, (False, True), strict=True):
        theirs.update(images, real=real)
    assert few.value(0)["fid"] == pytest.approx(float(theirs.compute()), rel=1e-3)


@pytest.mark.slow
def test_statistics_of_features_agree_with_torch_fidelity(few: Measured) -> None:
    gaussian, rows = few.statistics[0][0], few.statistics[0][1]
    assert isinstance(gaussian, GaussianStatistics)
    assert isinstance(rows, Rows)
    theirs = fid_features_to_statistics(rows["features"].double())
    mean, covariance = gaussian.moments()
    np.testing.assert_allclose(mean, theirs["mu"], rtol=1e-6)
    np.testing.assert_allclose(covariance, theirs["sigma"], rtol=1e-6, atol=1e-9)


def test_spatial_features_come_of_the_same_pass(few: Measured) -> None:
    generated, real = (side[4] for side in few.statistics)
    assert isinstance(generated, GaussianStatistics)
    assert isinstance(real, GaussianStatistics)
    means = [side.moments()[0] for side in (generated, real)]
    assert means[0].shape == (2023,)
    assert float((means[0] - means[1]).abs().mean()) > 1e-3


def features(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def filled(metric: Metric, values: Tensor) -> Statistics:
    """A metric's statistics of made-up features."""
    statistics = metric.statistics()
    (samples,) = batches(torch.zeros(len(values), 3, 8, 8), len(values))
    statistics.update({"features": values, "spatial": values}, samples)
    return statistics


@pytest.mark.parametrize("kind", [FID, SFID, FrameFID])
def test_identical_sets_are_nothing_apart(kind: type[FID | SFID | FrameFID]) -> None:
    metric = kind()
    (value,) = metric.compute(*(filled(metric, features(9, 0)) for _ in range(2))).values()
    assert value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", [FID, SFID])
def test_frames_of_videos_are_refused(kind: type[FID | SFID]) -> None:
    with pytest.raises(FewstepError, match="FrameFID"):
        filled(kind(), features(8, 0).unflatten(0, (2, 4)))


def test_frames_of_all_videos_are_one_set() -> None:
    metric = FrameFID()
    videos, reference = features(40, 0), filled(metric, features(30, 1))
    whole = metric.compute(filled(metric, videos), reference)
    assert metric.compute(filled(metric, videos.unflatten(0, (8, 5))), reference) == {
        "frame_fid": pytest.approx(whole["frame_fid"])
    }


@pytest.mark.parametrize(("count", "other", "side"), [(6, 7, "generated"), (7, 6, "reference")])
def test_too_few_samples_for_a_covariance_are_warned_of(
    count: int, other: int, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    metric = FID()
    with caplog.at_level(logging.WARNING):
        metric.compute(filled(metric, features(7, 0)), filled(metric, features(7, 1)))
    assert not caplog.records
    sets = filled(metric, features(count, 0)), filled(metric, features(other, 1))
    with caplog.at_level(logging.WARNING):
        value = metric.compute(*sets)["fid"]
    (record,) = caplog.records
    assert f"fid: 6 {side} samples are fewer than the 7" in record.getMessage()
    # The value itself is right: that of the same sets by singular values of the samples.
    centred = [x - x.mean(0) for x in (features(count, 0).double(), features(other, 1).double())]
    a, b = (x / (len(x) - 1) ** 0.5 for x in centred)
    gap = (features(count, 0).double().mean(0) - features(other, 1).double().mean(0)).square()
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert value == pytest.approx(float(gap.sum() + traces), rel=1e-7)


def test_names_tell_inceptions_resize() -> None:
    kinds = (FID, SFID, FrameFID)
    assert [kind().name for kind in kinds] == ["fid", "sfid", "frame_fid"]
    clean = InceptionFeatures(resize="clean")
    assert [kind(clean).name for kind in kinds] == ["clean_fid", "clean_sfid", "clean_frame_fid"]
