from __future__ import annotations

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from fewstep.metrics import Samples, SlicedWasserstein, collect, sliced_wasserstein


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(metric: SlicedWasserstein, reference: Tensor, *batches: Tensor) -> float:
    sets = []
    for parts in ([reference], batches):
        starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
        numbered = [
            Samples(part, torch.arange(start, start + len(part)))
            for part, start in zip(parts, starts, strict=True)
        ]
        sets += collect([metric], numbered)
    return metric.compute(sets[1], sets[0])["sliced_wasserstein"]


def test_a_shift_moves_each_projection_by_its_share() -> None:
    samples, shift = randn(500, 3), torch.tensor([1.0, -2.0, 0.5]).double()
    metric = SlicedWasserstein()
    expected = float((metric.directions(3) @ shift).abs().mean())
    assert value(metric, samples, samples + shift) == pytest.approx(expected, rel=1e-9)


def test_directions_are_spread_evenly() -> None:
    # The mean of |cos| over the circle is 2 / pi, over the sphere 1 / 2.
    for shift, mean in [([3.0, 4.0], 2 / torch.pi), ([0.0, 3.0, 4.0], 0.5)]:
        directions = SlicedWasserstein(num_directions=20_000).directions(len(shift))
        projected = directions @ torch.tensor(shift, dtype=torch.float64)
        assert float(projected.abs().mean()) == pytest.approx(5 * mean, rel=0.02)
        assert projected.mean().abs() < 0.1


def test_identical_sets_have_distance_zero_in_any_order() -> None:
    samples = randn(200, 2)
    assert value(SlicedWasserstein(), samples, samples) == 0
    shuffled = samples[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert value(SlicedWasserstein(), samples, *shuffled.split(7)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "other_count"), [(400, 400), (300, 500), (500, 300)])
def test_it_agrees_with_scipy_direction_by_direction(count: int, other_count: int) -> None:
    first, second = randn(count, 2), 2 * randn(other_count, 2, seed=1).exp()
    directions = SlicedWasserstein(num_directions=8).directions(2)
    exact = [wasserstein_distance(first @ u, second @ u) for u in directions]
    ours = float(sliced_wasserstein(first, second, directions))
    assert ours == pytest.approx(sum(exact) / 8, rel=0.02)


def test_directions_are_unit_vectors_fixed_by_the_seed() -> None:
    directions = SlicedWasserstein(num_directions=16, seed=3).directions(5)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(16).double())
    assert torch.equal(directions, SlicedWasserstein(16, 3).directions(5))
    assert not torch.equal(directions, SlicedWasserstein(16, 4).directions(5))


def test_images_are_taken_as_vectors() -> None:
    images = randn(40, 1, 4, 4)
    assert value(SlicedWasserstein(), images.flatten(1), images) == 0


def test_the_protocol_says_what_values_depend_on() -> None:
    protocol = SlicedWasserstein(num_directions=8, seed=5).protocol()
    assert protocol == {"metric": "sliced_wasserstein", "directions": 8, "seed": 5}
