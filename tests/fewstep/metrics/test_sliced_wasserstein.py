from __future__ import annotations

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from fewstep.metrics import SlicedWasserstein, sliced_wasserstein


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(metric: SlicedWasserstein, *batches: Tensor) -> float:
    accumulator = metric.accumulate()
    for batch in batches:
        accumulator.update(batch)
    return accumulator.compute()


def against(reference: Tensor, **options: int) -> SlicedWasserstein:
    metric = SlicedWasserstein(**options)
    metric.set_reference(reference.split(33))
    return metric


def test_a_shift_moves_each_projection_by_its_share() -> None:
    samples, shift = randn(500, 3), torch.tensor([1.0, -2.0, 0.5]).double()
    metric = against(samples)
    expected = float((metric.directions(3) @ shift).abs().mean())
    assert value(metric, samples + shift) == pytest.approx(expected, rel=1e-9)


def test_directions_are_spread_evenly() -> None:
    # The mean of |cos| over the circle is 2 / pi, over the sphere 1 / 2.
    for shift, mean in [([3.0, 4.0], 2 / torch.pi), ([0.0, 3.0, 4.0], 0.5)]:
        directions = SlicedWasserstein(num_directions=20_000).directions(len(shift))
        projected = directions @ torch.tensor(shift, dtype=torch.float64)
        assert float(projected.abs().mean()) == pytest.approx(5 * mean, rel=0.02)
        assert projected.mean().abs() < 0.1


def test_identical_sets_have_distance_zero_in_any_order() -> None:
    samples = randn(200, 2)
    assert value(against(samples), samples) == 0
    shuffled = samples[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert value(against(samples), *shuffled.split(7)) == pytest.approx(0, abs=1e-12)


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


def test_ranks_together_say_what_one_process_says() -> None:
    metric, samples = against(randn(200, 2)), randn(100, 2, seed=1) + 1
    first = metric.accumulate()
    first.update(samples[:50])
    merged = first.compute(lambda mine: torch.stack([mine, samples[50:]]))
    assert merged == pytest.approx(value(metric, samples), rel=1e-9)


def test_images_are_taken_as_vectors() -> None:
    images = randn(40, 1, 4, 4)
    assert value(against(images.flatten(1)), images) == 0


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference"):
        value(SlicedWasserstein(), randn(4, 2))
    with pytest.raises(ValueError, match="add samples"):
        value(against(randn(4, 2)))


def test_the_protocol_says_what_values_depend_on() -> None:
    protocol = SlicedWasserstein(num_directions=8, seed=5).protocol()
    assert protocol == {"metric": "sliced_wasserstein", "directions": 8, "seed": 5}
