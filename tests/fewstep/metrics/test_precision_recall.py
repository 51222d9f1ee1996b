from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from fewstep.errors import FewstepError
from fewstep.metrics import PrecisionRecall
from fewstep.metrics.precision_recall import manifold_values

from metric_cases import Flat, batches, measured, measured_by_ranks

NAMES = ["precision_flat", "recall_flat", "density_flat", "coverage_flat"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GENERATED, REAL = 0.8 * randn(70, 6) + 0.3, randn(90, 6, seed=1)


def brute_force(generated: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    """Density and coverage, as their definition reads."""
    radii = [sorted(float((a - b).norm()) for b in real)[k] for a in real]
    balls = list(zip(real, radii, strict=True))
    inside = [[float((a - g).norm()) < r for g in generated] for a, r in balls]
    return sum(map(sum, inside)) / (k * len(generated)), sum(map(any, inside)) / len(real)


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_torch_fidelitys(k: int, block: int) -> None:
    found = manifold_values(GENERATED, REAL, k, 5, block)
    theirs = prc_features_to_metric(GENERATED, REAL, prc_neighborhood=k, verbose=False)
    assert 0.1 < found["recall"] < found["precision"] < 1
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_what_their_definition_says(k: int) -> None:
    found = manifold_values(GENERATED, REAL, 3, k, block=16)
    density, coverage = brute_force(GENERATED, REAL, k)
    assert 0.1 < coverage < 1
    assert found["density"] == pytest.approx(density)
    assert found["coverage"] == pytest.approx(coverage)


def test_one_distribution_is_as_dense_as_itself() -> None:
    # Naeem et al., equations 5 and 7: 1, and 1 - ((M - 1) ... (M - k)) / ((2 M - 1) ... (2 M - k)).
    found = [
        manifold_values(randn(400, 4, seed=s), randn(400, 4, seed=s + 100), 3, 5) for s in range(5)
    ]
    assert sum(f["density"] for f in found) / 5 == pytest.approx(1, abs=0.05)
    assert sum(f["coverage"] for f in found) / 5 == pytest.approx(1 - 0.5**5, abs=0.02)


def test_a_set_is_all_in_its_own_manifold() -> None:
    found = measured(PrecisionRecall(Flat()), batches(REAL), batches(REAL))
    assert found["precision_flat"] == found["recall_flat"] == found["coverage_flat"] == 1


def test_a_collapsed_set_is_precise_and_recalls_nothing() -> None:
    collapsed = 1e-3 * randn(50, 6, seed=2)
    found = measured(PrecisionRecall(Flat()), batches(collapsed), batches(REAL))
    assert found["precision_flat"] == 1
    assert found["recall_flat"] == 0
    assert found["coverage_flat"] < 0.5


def test_a_far_set_shares_nothing() -> None:
    found = measured(PrecisionRecall(Flat()), batches(GENERATED + 100), batches(REAL))
    assert found == dict.fromkeys(NAMES, 0.0)


def test_order_batches_and_ranks_do_not_matter() -> None:
    metric = PrecisionRecall(Flat(), most=60)
    whole = measured(metric, batches(GENERATED), batches(REAL))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist()
    assert measured(metric, batches(GENERATED, 9, order=order), batches(REAL, 50)) == whole
    for found in measured_by_ranks(metric, batches(GENERATED, 9), batches(REAL, 50)):
        assert found == whole
    assert whole == measured(PrecisionRecall(Flat()), batches(GENERATED[:60]), batches(REAL[:60]))


def test_too_few_samples_are_an_error() -> None:
    metric = PrecisionRecall(Flat())
    assert set(measured(metric, batches(REAL[:6]), batches(REAL[6:12]))) == set(NAMES)
    with pytest.raises(FewstepError, match=r"at least 6 samples.* 5 generated .* 90"):
        measured(metric, batches(GENERATED[:5]), batches(REAL))
    with pytest.raises(FewstepError, match="at least 1"):
        PrecisionRecall(Flat(), k=0)


def test_values_over_inception_need_no_other_name() -> None:
    assert list(PrecisionRecall().better) == ["precision", "recall", "density", "coverage"]
    assert PrecisionRecall(Flat(), k=7).protocol() == {
        "metric": "precision_recall",
        "k": 7,
        "density_k": 5,
        "most": 50_000,
        "features": {"name": "flat"},
    }
