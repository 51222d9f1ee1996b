from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

from fewstep.errors import FewstepError
from fewstep.metrics import KID
from fewstep.metrics.kid import squared_mmd

from metric_cases import Flat, batches, measured, measured_by_ranks, noise


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GENERATED, REAL = 1.2 * randn(50, 8) + 0.2, randn(60, 8, seed=1)


@pytest.mark.parametrize(
    "options", [{}, {"degree": 2, "coef": 0.5}, {"gamma": 0.3}, {"seed": 7, "subsets": 3}]
)
def test_equal_features_give_torch_fidelitys_values(options: dict[str, float]) -> None:
    given = {"subsets": 20, "subset_size": 25, **options}
    metric = KID(Flat(), **given)
    found = measured(metric, batches(GENERATED), batches(REAL))
    theirs = kid_features_to_metric(
        GENERATED,
        REAL,
        kid_subsets=metric.subsets,
        kid_subset_size=25,
        kid_kernel_poly_degree=metric.degree,
        kid_kernel_poly_gamma=metric.gamma,
        kid_kernel_poly_coef0=metric.coef,
        rng_seed=metric.seed,
        verbose=False,
    )
    mean, std = theirs.values()
    assert found["kernel_distance_flat"] == pytest.approx(mean, rel=1e-4)
    assert found["kernel_distance_flat_std"] == pytest.approx(std, rel=1e-4)


def test_a_linear_kernel_measures_how_far_the_means_are_apart() -> None:
    first, second = randn(200, 3).double() + 2, randn(200, 3, seed=1).double()
    # Without bias: |m1 - m2|^2 less what each mean's own noise adds to it.
    noises = sum(x.var(0).sum() / 200 for x in (first, second))
    expected = (first.mean(0) - second.mean(0)).square().sum() - noises
    assert float(squared_mmd(first, second, 1, 1.0, 0.0)) == pytest.approx(float(expected))


def test_it_is_unbiased_and_may_be_negative() -> None:
    pairs = [(randn(20, 4, seed=s), randn(20, 4, seed=s + 1000)) for s in range(300)]
    found = torch.stack([squared_mmd(a.double(), b.double(), 3, None, 1.0) for a, b in pairs])
    assert float(found.min()) < 0
    assert abs(float(found.mean())) < 3 * float(found.std()) / 300**0.5


def test_identical_sets_are_about_nothing_apart() -> None:
    # Only that no sample is compared with itself within a set tells the three means apart.
    kernel = (REAL.double() @ REAL.double().T / 8 + 1) ** 3
    alike, apart = kernel.trace() / 60, (kernel.sum() - kernel.trace()) / (60 * 59)
    metric = KID(Flat(), subsets=2, subset_size=60)
    found = measured(metric, batches(REAL), batches(REAL))
    assert found["kernel_distance_flat"] == pytest.approx(float(2 * (apart - alike) / 60))
    assert found["kernel_distance_flat_std"] == pytest.approx(0, abs=1e-9)


def test_order_batches_and_ranks_do_not_matter() -> None:
    metric = KID(Flat(), subsets=5, subset_size=20, most=40)
    whole = measured(metric, batches(GENERATED), batches(REAL))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert measured(metric, batches(GENERATED, 7, order=order), batches(REAL, 60)) == whole
    for found in measured_by_ranks(metric, batches(GENERATED, 7), batches(REAL, 25)):
        assert found == whole
    everything = measured(KID(Flat(), 5, 20), batches(GENERATED), batches(REAL))
    assert everything != whole


def test_too_few_samples_are_an_error() -> None:
    metric = KID(Flat(), subset_size=51)
    with pytest.raises(FewstepError, match=r"subsets of 51 .* 50 generated .* 60 .*subset_size"):
        measured(metric, batches(GENERATED), batches(REAL))
    metric.check(51)
    with pytest.raises(FewstepError, match=r"subsets of 51 samples, but only 50"):
        metric.check(50)
    with pytest.raises(FewstepError, match="subset_size"):
        KID(Flat(), subset_size=1)


def test_frames_of_videos_are_refused() -> None:
    class OfFrames(Flat):
        def __call__(self, samples: object) -> dict[str, Tensor]:
            return {"features": torch.zeros(3, 4, 2)}

    with pytest.raises(FewstepError, match="FrameFID"):
        measured(KID(OfFrames()), batches(noise(3, 3, 4, 8, 8)))


def test_its_names_say_what_it_looks_through() -> None:
    assert list(KID().better) == ["kid", "kid_std"]
    assert KID(Flat()).protocol() == {
        "metric": "kernel_distance_flat",
        "subsets": 100,
        "subset_size": 1000,
        "kernel": {"degree": 3, "gamma": None, "coef": 1.0},
        "seed": 2020,
        "most": 50_000,
        "features": {"name": "flat"},
    }
