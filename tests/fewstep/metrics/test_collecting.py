"""What several metrics share: networks, statistics, and their way over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics import (
    KID,
    CLIPScore,
    Collection,
    Features,
    FrechetDistance,
    InceptionScore,
    LPIPSDiversity,
    Metric,
    PairedDistance,
    PairedLPIPS,
    PairedPSNR,
    PrecisionRecall,
    Ranks,
    SlicedWasserstein,
    merged,
)

from metric_cases import Flat, batches, noise


def shared(*metrics: Metric) -> list[int]:
    """The statistics of each metric by a small number."""
    identities = [id(each) for each in Collection(metrics).statistics]
    return [identities.index(each) for each in identities]


def test_metrics_of_the_same_pairs_keep_their_pixels_once() -> None:
    assert shared(PairedPSNR(8), PairedDistance(8), PairedLPIPS(pairs=8), PairedPSNR(9)) == [
        0,
        0,
        0,
        3,
    ]
    assert shared(LPIPSDiversity(most=8), PairedPSNR(8)) == [0, 0]
    assert shared(LPIPSDiversity(most=8, among="same_prompt"), PairedPSNR(8)) == [0, 1]


def test_tables_of_the_same_features_are_kept_once() -> None:
    features = Flat()
    tables = [KID(features), PrecisionRecall(features), KID(Flat()), KID(features, most=5)]
    assert shared(*tables, FrechetDistance(features)) == [0, 0, 2, 3, 4]
    assert shared(SlicedWasserstein(8), SlicedWasserstein(9)) == [0, 0]


def test_shared_statistics_see_every_sample_once_and_are_merged_once() -> None:
    metrics = [PairedPSNR(8), PairedDistance(8)]
    collection = Collection(metrics)
    for samples in batches(noise(5, 3, 4, 4)):
        collection.update(samples)
    first, second = merged(collection.statistics, Ranks(alone=True))
    assert first is second
    assert first.tensors()["numbers"].tolist() == [0, 1, 2, 3, 4]


class Held(Flat):
    """Features that hold a network as most do."""

    def load(self, device: torch.device) -> None:
        self.network = nn.Linear(2, 2, device=device)
        self.device = device


def test_a_network_can_be_moved_away() -> None:
    features: Features = Held()
    features.to(torch.device("meta"))  # before it is loaded there is nothing to move
    features.load(torch.device("cpu"))
    features.to(torch.device("meta"))
    assert isinstance(features, Held)
    weight: Tensor = features.network.weight
    assert weight.device == features.device == torch.device("meta")


@pytest.mark.parametrize(
    ("metric", "enough"),
    [
        (FrechetDistance(Flat()), 2),
        (KID(Flat(), subset_size=20), 20),
        (PrecisionRecall(Flat(), k=3, density_k=7), 8),
        (InceptionScore(splits=10), 10),
        (LPIPSDiversity(), 2),
        (PairedPSNR(), 1),
    ],
)
def test_metrics_know_how_many_samples_they_take(metric: Metric, enough: int) -> None:
    metric.check(enough)
    if enough > 1:
        with pytest.raises(FewstepError, match=str(enough - 1)):
            metric.check(enough - 1)


def test_metrics_of_prompts_say_that_they_need_them() -> None:
    assert CLIPScore().needs_prompts
    assert LPIPSDiversity(among="same_prompt").needs_prompts
    assert not LPIPSDiversity().needs_prompts
    assert not PairedPSNR().needs_prompts
