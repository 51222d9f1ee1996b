"""APT's times: the student's only one, and those that the discriminator is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.seeding import torch_generator

from post_training import built, digits, draw, flow_module


@pytest.mark.parametrize(
    ("shift", "mean", "median", "below"), [(1.0, 0.5, 0.5, 0.5), (12.0, 0.8445, 0.923, 0.077)]
)
def test_times_told_to_the_discriminator_follow_the_published_law(
    shift: float, mean: float, median: float, below: float
) -> None:
    module = flow_module(time_shift=shift)
    times = module.times(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert float(times.mean()) / 1000 == pytest.approx(mean, abs=0.004)
    assert float(times.median()) / 1000 == pytest.approx(median, abs=0.004)
    assert float((times < 500).float().mean()) == pytest.approx(below, abs=0.004)
    ends = module.times(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.0, 1000.0])


def test_times_of_a_discrete_model_are_its_own_and_reach_both_ends() -> None:
    times = built().times(torch.linspace(0, 1, 5001)[:-1])
    assert torch.equal(times, times.round())
    assert (times.min(), times.max()) == (0, 999)


def test_the_student_jumps_from_pure_noise_in_one_evaluation() -> None:
    module, batch = flow_module(), digits()
    network: Any = module.student.backbone
    draws = draw(module, batch)
    made = module.generate(draws.noise, batch["cond"])
    torch.testing.assert_close(made, draws.noise - (0.75 * draws.noise - 0.5))
    list(module.updates(batch, draws))
    assert network.times == [1000.0] * 3
    sampled = module.sample(draws.noise, batch["cond"], 1, role="student")
    torch.testing.assert_close(sampled, made)


def test_two_steps_renoise_or_go_on_along_the_line() -> None:
    batch = digits()
    z = draw(flow_module(), batch).noise
    t, v = 0.75, 0.75 * z - 0.5  # the middle of two steps at a shift of 3
    on_line = z - (1 - t) * v
    module = flow_module(two_steps="line")
    found = module.sample(z, batch["cond"], 2, role="student")
    torch.testing.assert_close(found, on_line - t * (0.75 * on_line - 0.5))
    module = flow_module(two_steps="renoise")
    found = module.sample(z, batch["cond"], 2, torch_generator(0, "x"), role="student")
    fresh = torch.randn(z.shape, generator=torch_generator(0, "x"))
    renoised = (1 - t) * (z - v) + t * fresh
    torch.testing.assert_close(found, renoised - t * (0.75 * renoised - 0.5))


# ---------------------------------------------------------------------- the shift of times

POSITIONS = torch.linspace(0, 1, 1001, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.25, 3.0, 12.0])
def test_a_shift_is_undone_by_that_of_its_inverse(shift: float) -> None:
    there = flow_module(time_shift=shift).times(POSITIONS) / 1000
    back = flow_module(time_shift=1 / shift).times(there) / 1000
    torch.testing.assert_close(back, POSITIONS)
    towards_noise = there[1:-1] > POSITIONS[1:-1]
    assert (towards_noise if shift > 1 else ~towards_noise).all()


def test_a_shift_of_one_leaves_positions_where_they_are() -> None:
    torch.testing.assert_close(flow_module(time_shift=1.0).times(POSITIONS), 1000 * POSITIONS)


def test_positions_are_shifted_before_they_are_scaled_to_the_networks_unit() -> None:
    """Shifted afterwards, nearly all of them would be 1.09 of 1,000."""
    late = 12 * 1000 * POSITIONS / (1 + 11 * 1000 * POSITIONS)
    assert ((late[100:] - 1.09).abs() < 0.01).all()
    wanted = 12 * POSITIONS / (1 + 11 * POSITIONS)
    times = flow_module(time_shift=12.0).times(POSITIONS)
    torch.testing.assert_close(times, 1000 * wanted)
    indices = built(time_shift=12.0).times(POSITIONS[:-1])
    assert torch.equal(indices, (1000 * wanted[:-1]).floor())


def test_positions_are_uniform_and_drawn_apart_for_each_look() -> None:
    draws = draw(flow_module(), digits(4000))
    looks = [draws.real_position, draws.fake_position, draws.student_position]
    steps = (torch.arange(4000) + 0.5) / 4000
    for positions in looks:
        assert float((positions.sort().values - steps).abs().max()) < 0.03  # 1.9 / sqrt(4000)
    assert (torch.stack(looks).corrcoef() - torch.eye(3)).abs().max() < 0.06
