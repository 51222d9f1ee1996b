"""A Frechet distance over features that nobody trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics import FrechetDistance, RandomVideoFeatures, Samples

from metric_cases import batches, measured, measured_by_ranks, noise
from moving_samples import digit_clips

NAME = "frechet_random_video"


def loaded(clip_length: int = 8, **options: int) -> RandomVideoFeatures:
    features = RandomVideoFeatures(clip_length, **options)
    features.prepare()
    features.load(torch.device("cpu"))
    return features


def distance(generated: Tensor, reference: Tensor) -> float:
    return measured(FrechetDistance(loaded()), batches(generated, 64), batches(reference, 64))[NAME]


@pytest.mark.slow
def test_it_tells_disorder_stillness_and_marks_from_other_clips_of_the_same_kind() -> None:
    reference, _ = digit_clips("clear", 250, num_frames=8)
    others, _ = digit_clips("clear", 250, start=1000, num_frames=8)
    marked, _ = digit_clips("watermarked", 250, start=1000, num_frames=8)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(8, generator=generator) for _ in others]
    shuffled = torch.stack([v[:, order] for v, order in zip(others, orders, strict=True)])
    alike = distance(others, reference)
    assert distance(shuffled, reference) > 3 * alike
    assert distance(others[:, :, :1].expand_as(others), reference) > 3 * alike
    assert distance(marked, reference) > 3 * alike
    assert distance(reference, reference) == pytest.approx(0, abs=1e-6)


def test_the_seed_decides_and_nothing_else_does() -> None:
    samples = Samples(noise(3, 1, 8, 32, 32), torch.arange(3))
    with torch.random.fork_rng():
        first = loaded()(samples)["features"]
        torch.manual_seed(5)
        again = loaded(batch_size=1)(samples)["features"]
    assert first.shape == (3, 160)
    torch.testing.assert_close(first, again)
    other = loaded(seed=1)
    assert not torch.allclose(first, other(samples)["features"])
    assert loaded().identity() == loaded().identity() != other.identity()
    assert loaded().protocol()["weights_sha256"] != other.protocol()["weights_sha256"]


def test_it_is_called_random_everywhere() -> None:
    metric = FrechetDistance(loaded())
    assert metric.name == NAME
    assert metric.protocol()["features"]["weights"] == "random, never trained"
    assert metric.protocol()["features"]["clip_length"] == 8


def test_ranks_together_say_what_one_process_says() -> None:
    sets = batches(noise(7, 1, 8, 16, 16), 2), batches(noise(6, 1, 8, 16, 16, seed=1), 3)
    metric = FrechetDistance(loaded())
    whole = measured(metric, *sets)
    for found in measured_by_ranks(metric, *sets):
        assert found == pytest.approx(whole, rel=1e-6)


def test_clips_that_are_too_short_say_so() -> None:
    with pytest.raises(FewstepError, match="8 frames; 16"):
        loaded(16)(Samples(noise(1, 1, 8, 16, 16), torch.arange(1)))
