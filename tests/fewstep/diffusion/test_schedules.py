from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fewstep.diffusion import (
    FlowSchedule,
    PhaseSchedule,
    Prediction,
    PredictionType,
    Schedule,
    TimeGrid,
    VPSchedule,
    to_prediction,
)
from fewstep.errors import FewstepError
from fewstep.spec import build, describe

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = [
    VPSchedule(),
    VPSchedule(trajectory_end="clean"),
    VPSchedule("squaredcos_cap_v2"),
    FlowSchedule(),
    FlowSchedule(shift=3.0, trajectory_end="first_index"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(time: float, count: int = 2) -> Tensor:
    return torch.full((count,), time, dtype=torch.float64)


def ddim(prediction_type: PredictionType, **options: object) -> DDIMScheduler:
    """diffusers' DDIM in float64, so that it can be compared to rounding error."""
    scheduler = DDIMScheduler(**SD_BETAS, prediction_type=prediction_type, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def ddim_deviation(scheduler: DDIMScheduler, steps: int, prediction_type: PredictionType) -> float:
    """Largest difference over a chain between our jump and diffusers' step."""
    schedule = VPSchedule()
    scheduler.set_timesteps(steps)
    times = [*scheduler.timesteps.tolist(), 0]
    ours = theirs = randn(2, 3, 4, 4)
    worst = 0.0
    for index in range(steps):
        output = randn(2, 3, 4, 4, seed=index + 1)
        levels = schedule.levels(at(times[index]), ours)
        prediction = to_prediction(output, ours, *levels, prediction_type)
        ours = schedule.jump(prediction, at(times[index + 1]))
        theirs = scheduler.step(output, times[index], theirs).prev_sample
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


EXACT = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 20])
def test_jump_is_the_ddim_step_of_diffusers(prediction_type: PredictionType, steps: int) -> None:
    scheduler = ddim(prediction_type, **EXACT)
    assert ddim_deviation(scheduler, steps, prediction_type) < 1e-12


def test_clipping_as_diffusers_does_by_default_would_be_noticed() -> None:
    scheduler = ddim("epsilon", **{**EXACT, "clip_sample": True})
    assert ddim_deviation(scheduler, 4, "epsilon") > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_phases", [1, 4, 8])
@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"]
)
def test_a_jump_to_an_edge_from_that_edge_is_the_identity(
    schedule: Schedule, num_phases: int, prediction_type: PredictionType
) -> None:
    edges = PhaseSchedule(TimeGrid.uniform(schedule, 40), num_phases).edges.home
    for edge in edges:
        alpha, sigma = (
            float(level(at(edge.item()))[0]) for level in (schedule.alpha, schedule.sigma)
        )
        if (prediction_type == "epsilon" and alpha < 1e-6) or (
            prediction_type == "sample" and sigma == 0
        ):
            continue  # the output says nothing about the other half of the prediction there
        x, t = randn(2, 3), at(edge.item())
        levels = schedule.levels(t, x)
        prediction = to_prediction(randn(2, 3, seed=1), x, *levels, prediction_type)
        torch.testing.assert_close(schedule.jump(prediction, t), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_jumps_with_one_noise_compose(schedule: Schedule) -> None:
    t, u, s = (at(0.5 * schedule.t_max), at(0.3 * schedule.t_max), at(schedule.t_min))
    x, eps = randn(2, 3), randn(2, 3, seed=1)

    def move(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        levels = schedule.levels(start, x)
        return schedule.jump(to_prediction(eps, x, *levels, "epsilon"), end)

    torch.testing.assert_close(move(move(x, t, u), u, s), move(x, t, s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_jump_solves_the_exponential_integral_for_constant_noise(schedule: Schedule) -> None:
    # PCM eq. 2 with eps taken out of the integral of exp(-lambda), lambda = ln(alpha / sigma).
    t, s = at(0.7 * schedule.t_max), at(0.2 * schedule.t_max)
    x, eps = randn(2, 3), randn(2, 3, seed=1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.levels(t, x), schedule.levels(s, x)
    lambda_t, lambda_s = (alpha_t / sigma_t).log(), (alpha_s / sigma_s).log()
    integral = (-lambda_t).exp() - (-lambda_s).exp()
    expected = alpha_s / alpha_t * x - alpha_s * integral * eps
    prediction = to_prediction(eps, x, alpha_t, sigma_t, "epsilon")
    torch.testing.assert_close(schedule.jump(prediction, s), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(VPSchedule(), "v_prediction"), (FlowSchedule(3.0), "flow_prediction")],
)
def test_jump_length_is_how_far_a_unit_error_of_the_velocity_moves(
    schedule: Schedule, prediction_type: PredictionType
) -> None:
    t, s = at(0.7 * schedule.t_max), at(0.2 * schedule.t_max)
    x, velocity = randn(2, 3), randn(2, 3, seed=1)
    right, wrong = (
        schedule.jump(to_prediction(v, x, *schedule.levels(t, x), prediction_type), s)
        for v in (velocity, velocity + 1)
    )
    expected = schedule.jump_length(t, s)[:, None].expand(2, 3)
    torch.testing.assert_close(right - wrong, expected, rtol=0, atol=1e-12)
    assert (expected > 0).all()


@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_vp_levels_are_those_of_diffusers(betas: str) -> None:
    alpha_bar = DDIMScheduler(beta_schedule=betas).alphas_cumprod.double()
    schedule = VPSchedule(betas, 0.0001, 0.02)
    index = torch.arange(1000).double()
    torch.testing.assert_close(schedule.alpha(index).square(), alpha_bar, rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.sigma(index).square(), 1 - alpha_bar, rtol=0, atol=1e-12)


def test_vp_stays_variance_preserving_and_monotone_between_indices() -> None:
    schedule = VPSchedule()
    t = torch.linspace(-1, 999, 4321, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)
    assert (sigma.diff() > 0).all()


def test_zero_terminal_snr_reaches_pure_noise() -> None:
    schedule = VPSchedule(rescale_betas_zero_snr=True)
    # diffusers keeps a remnant of 2^-24 in alpha_bar.
    assert float(schedule.alpha(at(999.0))[0]) < 1e-3
    assert float(VPSchedule().alpha(at(999.0))[0]) == pytest.approx(0.068265, abs=1e-6)


def test_trajectories_end_at_index_zero_or_at_clean_data() -> None:
    first, clean = VPSchedule(), VPSchedule(trajectory_end="clean")
    assert first.t_min == 0
    assert float(first.sigma(at(first.t_min))[0]) == pytest.approx(0.00085**0.5, abs=1e-6)
    assert float(clean.sigma(at(clean.t_min))[0]) == 0
    assert float(clean.alpha(at(clean.t_min))[0]) == 1
    assert FlowSchedule().t_min == 0
    assert FlowSchedule(3.0, trajectory_end="first_index").t_min == pytest.approx(3 / 1.002)


def test_levels_of_a_half_precision_sample_are_exact_float32() -> None:
    # In bfloat16 index 999 would round to 1000, sigma to two or three digits.
    schedule = VPSchedule()
    alpha, sigma = schedule.levels(torch.tensor([999.0, 1.0]), torch.ones(2, 1, 1, 1).bfloat16())
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.shape == (2, 1, 1, 1)
    expected = schedule.alpha(torch.tensor([999.0, 1.0]))
    torch.testing.assert_close(alpha.flatten().double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoising_composes_to_the_forward_marginal(schedule: Schedule) -> None:
    # The kernel is linear, x_a = k x_s + std n, so both coefficients can be read off.
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    for low, high in [(0.05, 0.3), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.4, 1.0), (0.6, 0.6)]:
        s, a = at(low * schedule.t_max, 1), at(high * schedule.t_max, 1)
        k, std = schedule.renoise(one, s, a, zero), schedule.renoise(zero, s, a, one)
        (alpha_s, sigma_s), (alpha_a, sigma_a) = schedule.levels(s, one), schedule.levels(a, one)
        torch.testing.assert_close(k * alpha_s, alpha_a, rtol=0, atol=1e-12)
        torch.testing.assert_close((k * sigma_s) ** 2 + std**2, sigma_a**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoising_in_two_legs_has_the_law_of_one(schedule: Schedule) -> None:
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    s, a, b = (at(share * schedule.t_max, 1) for share in (0.2, 0.5, 0.8))

    def kernel(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return schedule.renoise(one, start, end, zero), schedule.renoise(zero, start, end, one)

    (k1, std1), (k2, std2), (k, std) = kernel(s, a), kernel(a, b), kernel(s, b)
    torch.testing.assert_close(k1 * k2, k, rtol=0, atol=1e-12)
    torch.testing.assert_close((k2 * std1) ** 2 + std2**2, std**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "right", "official"),
    [(0.25, 0.5, 0.559, 0.449), (0.5, 0.75, 0.760, 0.573), (0.75, 0.9, 0.901, 0.673)],
)
def test_flow_renoising_has_the_right_spread_where_the_released_formula_has_not(
    low: float, high: float, right: float, official: float
) -> None:
    schedule, count = FlowSchedule(), 400_000
    s, a = at(1000 * low, count), at(1000 * high, count)
    x0, first, fresh = (randn(count, 1, seed=seed) for seed in range(3))
    x_s = schedule.add_noise(0.5 * x0, first, s)
    spread = float(schedule.renoise(x_s, s, a, fresh).std())
    assert spread == pytest.approx(float(schedule.add_noise(0.5 * x0, fresh, a).std()), abs=3e-3)
    assert spread == pytest.approx(right, abs=3e-3)

    k, released_std = (1 - high) / (1 - low), (high - low) / (1 - low)
    released = float((k * x_s + released_std * fresh).std())
    assert released == pytest.approx(official, abs=3e-3)
    assert released < spread - 0.1


def test_renoising_to_the_same_time_changes_nothing() -> None:
    x, t = randn(2, 3), at(400.0)
    torch.testing.assert_close(VPSchedule().renoise(x, t, t, randn(2, 3, seed=1)), x)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 16, 30, 50])
def test_spaced_times_are_diffusers_trailing_times(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert VPSchedule().spaced_times(steps).tolist() == [*scheduler.timesteps.tolist(), 0]


def test_vp_grids_are_the_last_index_of_each_stride() -> None:
    assert VPSchedule().grid_times(5).tolist() == [199, 399, 599, 799, 999]
    assert VPSchedule().grid_times(50)[:2].tolist() == [19, 39]


def test_flow_grids_are_shifted_as_in_sd3() -> None:
    assert FlowSchedule().grid_times(4).tolist() == pytest.approx([250, 500, 750, 1000])
    assert FlowSchedule(3.0).grid_times(4).tolist() == pytest.approx([500, 750, 900, 1000])
    assert FlowSchedule(3.0).spaced_times(2).tolist() == pytest.approx([1000, 750, 0])


@pytest.mark.parametrize("num_points", [64, 0, -4, 1001, 1024])
def test_a_vp_grid_that_would_miss_the_last_index_is_refused(num_points: int) -> None:
    with pytest.raises(FewstepError, match=rf"{num_points}\b.*num_grid_points.* 40, 50, 100"):
        VPSchedule().grid_times(num_points)


def test_senseless_flow_settings_are_refused() -> None:
    with pytest.raises(FewstepError, match="0"):
        FlowSchedule().grid_times(0)
    with pytest.raises(FewstepError, match=r"-1\.0"):
        FlowSchedule(shift=-1.0)


def test_vp_training_times_are_all_indices_alike() -> None:
    times = VPSchedule().sample_times((100_000,), torch.Generator().manual_seed(0))
    counts = times.long().bincount(minlength=1000)
    assert torch.equal(times, times.round())
    assert len(counts) == 1000
    assert 50 < int(counts.min()) < int(counts.max()) < 160  # expected 100 each


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_training_times_follow_their_law(law: str, shift: float) -> None:
    schedule = FlowSchedule(shift, time_distribution=law)
    times = schedule.sample_times((100_000,), torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    raw = levels if law == "uniform" else torch.special.ndtri(levels).sigmoid()
    expected = 1000 * shift * raw / (1 + (shift - 1) * raw)
    torch.testing.assert_close(times.quantile(levels), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_times_are_a_function_of_the_generator(schedule: Schedule) -> None:
    first, again, other = (
        schedule.sample_times((8,), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_vp_times_between_edges_are_all_the_indices_of_the_phase() -> None:
    position = torch.arange(0, 1, 1 / 5003, dtype=torch.float64)
    low, high = torch.full_like(position, 499), torch.full_like(position, 749)
    drawn = VPSchedule().time_between(low, high, position)
    assert drawn.unique().tolist() == list(range(499, 750))
    clean = VPSchedule(trajectory_end="clean").time_between(low * 0 - 1, low * 0 + 3, position)
    assert clean.unique().tolist() == [0, 1, 2, 3]


def test_flow_times_between_edges_are_spread_evenly() -> None:
    position = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    drawn = FlowSchedule().time_between(at(500.0, 3), at(750.0, 3), position)
    assert drawn.tolist() == [500, 562.5, 625]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**SD_BETAS),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
        DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True),
        DDIMScheduler(trained_betas=[0.01 * (i + 1) for i in range(20)], num_train_timesteps=20),
    ],
)
def test_from_diffusers_takes_over_the_schedulers_betas(scheduler: DDIMScheduler) -> None:
    schedule = VPSchedule.from_diffusers(scheduler, "clean")
    count = len(scheduler.alphas_cumprod)
    alpha_bar = schedule.alpha(torch.arange(count).double()).square()
    torch.testing.assert_close(alpha_bar, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-12)
    assert (schedule.t_max, schedule.t_min) == (count - 1, -1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_described_schedule_is_rebuilt_equal(schedule: Schedule) -> None:
    rebuilt = build(describe(schedule), Schedule)
    t = torch.linspace(0, schedule.t_max, 11, dtype=torch.float64)
    assert torch.equal(rebuilt.sigma(t), schedule.sigma(t))
    assert torch.equal(rebuilt.spaced_times(4), schedule.spaced_times(4))
    assert rebuilt.config == schedule.config


def test_jump_reads_both_halves_of_the_prediction() -> None:
    schedule, s = VPSchedule(), at(499.0)
    prediction = Prediction(torch.ones(2, 1).double(), torch.zeros(2, 1).double())
    torch.testing.assert_close(schedule.jump(prediction, s), schedule.alpha(s)[:, None])
    swapped = Prediction(prediction.eps, prediction.x0)
    torch.testing.assert_close(schedule.jump(swapped, s), schedule.sigma(s)[:, None])
