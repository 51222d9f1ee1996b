from __future__ import annotations

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from fewstep.errors import FewstepError
from fewstep.metrics import (
    FrechetDistance,
    GaussianStatistics,
    Ranks,
    Samples,
    collect,
    frechet_distance,
)

from metric_cases import Flat
from ranks import in_group, run_ranks


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> Tensor:
    root = randn(dim, dim, seed=seed)
    return root @ root.T / dim + 0.1 * torch.eye(dim)


def statistics(*batches: Tensor) -> GaussianStatistics:
    found = GaussianStatistics()
    for batch in batches:
        found.add(batch)
    return found


def value(reference: Tensor, *batches: Tensor) -> float:
    metric = FrechetDistance(Flat())
    samples = [Samples(batch, torch.arange(len(batch))) for batch in batches]
    (generated,) = collect([metric], samples)
    return metric.compute(generated, statistics(reference))["frechet_flat"]


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
    assert value(few, few) == pytest.approx(0, abs=1e-9)


def test_identical_sets_have_distance_zero() -> None:
    samples = randn(500, 16) + 3
    assert value(samples, samples) == pytest.approx(0, abs=1e-9)


def test_a_shifted_set_is_as_far_as_the_shift_squared() -> None:
    samples, shift = randn(500, 4), torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    assert value(samples, samples + shift) == pytest.approx(float(shift.square().sum()))


def test_a_rescaled_set_is_as_far_as_its_spread_says() -> None:
    samples = randn(500, 4)
    samples = samples - samples.mean(0)
    expected = float(samples.T.cov().trace())  # (3 - 2)^2 of every eigenvalue
    assert value(2 * samples, 3 * samples) == pytest.approx(expected)


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    features = randn(50, 6).float() + 100
    mean, cov = statistics(*features.split(7)).moments()
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, features.double().T.cov(), rtol=1e-8, atol=1e-8)


def test_order_and_batch_size_do_not_matter() -> None:
    reference, samples = randn(200, 8), randn(300, 8, seed=1) * 1.5
    whole = value(reference, samples)
    assert value(reference, *samples.split(17)) == pytest.approx(whole, rel=1e-9)
    shuffled = samples[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert value(reference, *shuffled.split(64)) == pytest.approx(whole, rel=1e-9)
    assert whole > 0.1


def merged_by_rank(samples: Tensor, rank_rows: int) -> dict[str, Tensor]:
    ranks = Ranks()
    mine = [samples[:rank_rows], samples[rank_rows:]][ranks.rank]
    return statistics(*([mine] if len(mine) else [])).merged(ranks).tensors()


@pytest.mark.parametrize("rank_rows", [110, 300])
def test_ranks_together_say_what_one_process_says(rank_rows: int) -> None:
    samples = randn(300, 8, seed=1) * 1.5
    whole = statistics(samples).tensors()
    for found in run_ranks(2, in_group, merged_by_rank, samples, rank_rows):
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


def test_small_batches_wait_until_their_sum_is_worth_its_time() -> None:
    samples = randn(1200, 4)
    found = statistics(*samples[:500].split(50))
    assert found.count is None
    for batch in samples[500:].split(50):
        found.add(batch)
    assert float(found.count or 0) == 550 + 550  # 100 wait
    expected = samples.mean(0), samples.T.cov()
    for moment, exact in zip(found.moments(), expected, strict=True):
        torch.testing.assert_close(moment, exact, rtol=1e-10, atol=1e-12)
    assert int(found.tensors()["count"]) == 1200


def test_stored_statistics_are_the_same_again() -> None:
    samples = randn(50, 4)
    restored = GaussianStatistics()
    restored.restore(statistics(samples).tensors())
    for found, expected in zip(restored.moments(), statistics(samples).moments(), strict=True):
        assert torch.equal(found, expected)


def test_frames_of_videos_count_as_samples() -> None:
    frames = randn(20, 5, 4)
    for found, expected in zip(
        statistics(frames).moments(), statistics(frames.flatten(0, 1)).moments(), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_it_is_named_after_its_features_and_not_an_fid() -> None:
    distance = FrechetDistance(Flat())
    assert distance.better == {"frechet_flat": "lower"}
    assert distance.protocol()["metric"] == "frechet_flat"
    assert distance.protocol()["features"] == {"name": "flat"}


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(FewstepError, match="two samples"):
        value(randn(4, 2), randn(1, 2))
    with pytest.raises(FewstepError, match="two samples"):
        value(randn(1, 2), randn(4, 2))
    with pytest.raises(ValueError, match="no samples"):
        statistics().tensors()
