from __future__ import annotations

import logging
import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from fewstep.errors import FewstepError
from fewstep.metrics import InceptionFeatures, InceptionScore
from fewstep.metrics.inception_score import inception_score

from metric_cases import Flat, batches, measured, measured_by_ranks


class FlatInception(Flat, InceptionFeatures):
    """Samples as their own logits, called by Inception's name."""


LOGITS = 3 * torch.randn(53, 12, generator=torch.Generator().manual_seed(0))


def score(splits: int = 10, seed: int = 2020) -> InceptionScore:
    return InceptionScore(FlatInception(), splits, seed)


@pytest.mark.parametrize(("splits", "seed"), [(10, 2020), (1, 2020), (4, 7)])
def test_equal_logits_give_torch_fidelitys_values(splits: int, seed: int) -> None:
    found = measured(score(splits, seed), batches(LOGITS))
    mean, std = isc_features_to_metric(LOGITS, splits, True, seed).values()
    assert found["inception_score"] == pytest.approx(mean, rel=1e-9)
    assert found["inception_score_std"] == pytest.approx(std, abs=1e-9)


def test_certain_and_even_classes_score_their_number() -> None:
    certain = torch.eye(7).repeat(5, 1).double() * 1e4
    assert float(inception_score(certain)) == pytest.approx(7)
    assert float(inception_score(certain[:1])) == pytest.approx(1)
    assert float(inception_score(torch.zeros(9, 7).double())) == pytest.approx(1)


def test_two_kinds_of_images_score_as_their_entropies_say() -> None:
    sure = torch.tensor([0.9, 0.1]).double()
    logits = torch.stack([sure, sure.flip(0)]).log()
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(inception_score(logits)) == pytest.approx(math.exp(math.log(2) - entropy))


def test_order_batches_and_ranks_do_not_matter() -> None:
    whole = measured(score(4), batches(LOGITS))
    order = torch.randperm(53, generator=torch.Generator().manual_seed(0)).tolist()
    assert measured(score(4), batches(LOGITS, 8, order=order)) == whole
    for found in measured_by_ranks(score(4), batches(LOGITS, 8)):
        assert found == whole
    assert measured(score(4, seed=1), batches(LOGITS)) != whole


def test_parts_smaller_than_the_number_of_classes_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        measured(score(splits=4), batches(LOGITS[:48]))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        measured(score(splits=4), batches(LOGITS[:47]))
    assert "too small" in caplog.text


def test_fewer_samples_than_parts_are_an_error() -> None:
    with pytest.raises(FewstepError, match=r"10 parts.* there are 9.*splits"):
        measured(score(), batches(LOGITS[:9]))
    with pytest.raises(FewstepError, match="splits"):
        score(splits=0)


def test_its_protocol_says_how_it_was_split() -> None:
    protocol = score(splits=5).protocol()
    assert (protocol["splits"], protocol["seed"]) == (5, 2020)
    assert score().reference == "none"
