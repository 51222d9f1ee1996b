from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from fewstep.metrics import Features, FrechetDistance, GaussianStatistics, frechet_distance


class Flat(Features):
    """Samples as their own features."""

    name = "flat"

    def prepare(self) -> None:
        pass

    def load(self, device: torch.device) -> None:
        pass

    def __call__(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)

    def protocol(self) -> dict[str, Any]:
        return {"name": "flat"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> Tensor:
    root = randn(dim, dim, seed=seed)
    return root @ root.T / dim + 0.1 * torch.eye(dim)


def metric(reference: Tensor) -> FrechetDistance:
    distance = FrechetDistance(Flat())
    distance.set_reference([reference])
    return distance


def value(distance: FrechetDistance, *batches: Tensor) -> float:
    accumulator = distance.accumulate()
    for batch in batches:
        accumulator.update(batch)
    return accumulator.compute()


def test_gaussians_on_common_axes_have_the_closed_distance() -> None:
    mean_1, mean_2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    std_1, std_2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.5]).double()
    distance = frechet_distance(mean_1, std_1.square().diag(), mean_2, std_2.square().diag())
    assert float(distance) == pytest.approx((1 + 0 + 4) + (4 + 0 + 1))
    # Rotating both together changes nothing.
    turn = torch.linalg.qr(randn(3, 3))[0]
    moments = [
        (turn @ m, turn @ (s.square().diag()) @ turn.T)
        for m, s in ((mean_1, std_1), (mean_2, std_2))
    ]
    assert float(frechet_distance(*moments[0], *moments[1])) == pytest.approx(10)


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_full_covariances_agree_with_the_matrix_square_root(dim: int) -> None:
    mean_1, mean_2 = randn(dim), randn(dim, seed=1)
    cov_1, cov_2 = covariance(dim, 2), covariance(dim, 3)
    ours = float(frechet_distance(mean_1, cov_1, mean_2, cov_2))
    root = torch.from_numpy(sqrtm((cov_1 @ cov_2).numpy()).real)
    textbook = (mean_1 - mean_2).square().sum() + (cov_1 + cov_2 - 2 * root).trace()
    assert ours == pytest.approx(float(textbook), abs=1e-6)
    assert ours == pytest.approx(float(_compute_fid(mean_1, cov_1, mean_2, cov_2)), abs=1e-6)
    assert float(frechet_distance(mean_2, cov_2, mean_1, cov_1)) == pytest.approx(ours)


def test_singular_covariances_are_no_obstacle() -> None:
    zero, one = torch.zeros(3).double(), torch.tensor([1.0, 0.0, 0.0]).double()
    flat, line = torch.diag(torch.tensor([4.0, 1.0, 0.0])).double(), torch.outer(one, one)
    assert float(frechet_distance(zero, flat, zero, line)) == pytest.approx((2 - 1) ** 2 + 1)
    assert float(frechet_distance(zero, flat, one, 0 * flat)) == pytest.approx(1 + 5)
    # Fewer samples than features: rank-deficient, and still zero to itself.
    few = randn(5, 64)
    assert value(metric(few), few) == pytest.approx(0, abs=1e-9)


def test_identical_sets_have_distance_zero() -> None:
    samples = randn(500, 16) + 3
    assert value(metric(samples), samples) == pytest.approx(0, abs=1e-9)


def test_a_shifted_set_is_as_far_as_the_shift_squared() -> None:
    samples, shift = randn(500, 4), torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    assert value(metric(samples), samples + shift) == pytest.approx(float(shift.square().sum()))


def test_a_rescaled_set_is_as_far_as_its_spread_says() -> None:
    samples = randn(500, 4)
    samples = samples - samples.mean(0)
    expected = float(samples.T.cov().trace())  # (3 - 2)^2 of every eigenvalue
    assert value(metric(2 * samples), 3 * samples) == pytest.approx(expected)


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    features = randn(50, 6).float() + 100
    statistics = GaussianStatistics.empty(6)
    for batch in features.split(7):
        statistics.update(batch)
    mean, cov = statistics.moments()
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, features.double().T.cov(), rtol=1e-8, atol=1e-8)


def test_order_and_batch_size_do_not_matter() -> None:
    distance, samples = metric(randn(200, 8)), randn(300, 8, seed=1) * 1.5
    whole = value(distance, samples)
    assert value(distance, *samples.split(17)) == pytest.approx(whole, rel=1e-9)
    shuffled = samples[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert value(distance, *shuffled.split(64)) == pytest.approx(whole, rel=1e-9)
    assert whole > 0.1


def test_ranks_together_say_what_one_process_says() -> None:
    distance, samples = metric(randn(200, 8)), randn(300, 8, seed=1) * 1.5
    ranks = [distance.accumulate(), distance.accumulate()]
    ranks[0].update(samples[:110])
    ranks[1].update(samples[110:])
    other = ranks[1].statistics
    assert other is not None
    sums = {t.ndim: t for t in (other.count, other.total, other.outer)}
    merged = ranks[0].compute(lambda mine: torch.stack([mine, sums[mine.ndim]]))
    assert merged == pytest.approx(value(distance, samples), rel=1e-9)
    assert merged != pytest.approx(ranks[0].compute(), rel=1e-3)


def test_collections_do_not_share_their_samples() -> None:
    distance, samples = metric(randn(200, 4)), randn(200, 4, seed=1) + 1
    first = value(distance, samples)
    value(distance, 5 * samples)
    assert value(distance, samples) == first


def test_it_is_named_after_its_features_and_not_an_fid() -> None:
    distance = FrechetDistance(Flat())
    assert distance.name == "frechet_flat"
    assert distance.protocol() == {"metric": "frechet_flat", "features": {"name": "flat"}}


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference"):
        value(FrechetDistance(Flat()), randn(4, 2))
    with pytest.raises(ValueError, match="add samples"):
        value(metric(randn(4, 2)))
    with pytest.raises(ValueError, match="two samples"):
        value(metric(randn(4, 2)), randn(1, 2))
