from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    TCDScheduler,
)
from torch import Tensor

from fewstep.diffusion import (
    AnalyticDenoiser,
    Cond,
    DenoiserLike,
    FlowSchedule,
    GaussianMixture,
    PhaseSchedule,
    Prediction,
    Schedule,
    TimeGrid,
    VPSchedule,
    consistency_sample,
    ode_sample,
    one_step_sample,
    phased_sample,
    solver_step,
)
from fewstep.networks import ring

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# At N = 50 these are not the times of evenly spaced schedulers.
PHASES = PhaseSchedule(TimeGrid.uniform(VPSchedule(), 50), 4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def ring_denoiser(schedule: Schedule) -> AnalyticDenoiser:
    return AnalyticDenoiser(ring(5), schedule)


class Counted:
    """A denoiser that records the times it was asked about."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.times: list[float] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        assert t.shape == (len(x_t),)
        self.times.append(float(t[0]))
        return self.denoiser(x_t, t, cond)


class ExactConsistency:
    """The optimal consistency function of a Gaussian: its jump to ``end`` is the true flow."""

    def __init__(self, denoiser: AnalyticDenoiser, end: float) -> None:
        self.denoiser, self.schedule, self.end = denoiser, denoiser.schedule, end

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        end = torch.full_like(t, self.end)
        arrived = self.denoiser.flow(x_t, t, end)
        alpha, sigma = self.schedule.levels(end, x_t)
        eps = self.denoiser(x_t, t).eps
        return Prediction((arrived - sigma * eps) / alpha, eps)


def widened(scheduler: DDIMScheduler | TCDScheduler) -> DDIMScheduler | TCDScheduler:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def test_phased_sampling_is_the_tcd_chain_of_diffusers() -> None:
    denoiser, times = ring_denoiser(VPSchedule()), PHASES.sampling_times(4)
    x = noise = randn(16, 2)
    scheduler = widened(TCDScheduler(**SD_BETAS))
    scheduler.set_timesteps(timesteps=[int(t) for t in times[:-1]])
    for t in scheduler.timesteps:
        eps = denoiser(x, t.double().expand(16)).eps
        x = scheduler.step(eps, int(t), x, eta=0.0).prev_sample
    ours = phased_sample(denoiser, noise, None, times)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
    # Other edges give another sample, so the agreement says something.
    elsewhere = phased_sample(denoiser, noise, None, VPSchedule().spaced_times(4))
    assert (ours - elsewhere).abs().max() > 0.01


@pytest.mark.parametrize(("final", "agrees"), [("sigma_min", True), ("zero", False)])
def test_phased_sampling_is_the_euler_chain_of_diffusers_in_scaled_space(
    final: str, agrees: bool
) -> None:
    schedule = VPSchedule()
    denoiser, times = ring_denoiser(schedule), PHASES.sampling_times(4)
    noise = randn(16, 2)
    scheduler = EulerDiscreteScheduler(**SD_BETAS, final_sigmas_type=final)
    scheduler.set_timesteps(timesteps=[int(t) for t in times[:-1]])
    y = noise / schedule.alpha(times[:1])
    for t in scheduler.timesteps:
        eps = denoiser(scheduler.scale_model_input(y, t), t.double().expand(16)).eps
        y = scheduler.step(eps, t, y).prev_sample
    result = y * schedule.alpha(times[-1:])
    difference = (phased_sample(denoiser, noise, None, times) - result).abs().max()
    assert (difference < 2e-5) == agrees
    assert agrees or difference > 1e-3  # it ends at x0 instead of at index 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_ode_sampling_is_the_flow_matching_euler_chain_of_diffusers(
    shift: float, num_steps: int
) -> None:
    schedule = FlowSchedule(shift)
    denoiser, times = ring_denoiser(schedule), schedule.spaced_times(num_steps)
    x = noise = randn(16, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)])
    torch.testing.assert_close(scheduler.timesteps.double(), times[:-1], rtol=1e-6, atol=0)
    for t in scheduler.timesteps:
        prediction = denoiser(x, t.double().expand(16))
        x = scheduler.step(prediction.eps - prediction.x0, t, x).prev_sample.double()
    ours = ode_sample(denoiser, noise, None, times)
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-6)


@pytest.mark.parametrize("stochasticity", [0.3, 0.8])
def test_stochasticity_is_the_eta_of_ddim(stochasticity: float) -> None:
    # r = 1 - eta^2 (1 - abar_t / abar_s) / (1 - abar_t), and no noise on the last jump.
    schedule = VPSchedule()
    denoiser, times = ring_denoiser(schedule), schedule.spaced_times(4)
    scheduler = widened(
        DDIMScheduler(
            **SD_BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
    )
    scheduler.set_timesteps(4)
    x, noise, generator = randn(16, 2), randn(16, 2), rng(7)
    alpha_bar = schedule.alpha(times).square()
    for index, t in enumerate(scheduler.timesteps):
        z, eta = None, 0.0
        if index < 3:
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            now, then = alpha_bar[index], alpha_bar[index + 1]
            eta = float((stochasticity * (1 - now) / (1 - now / then)).sqrt())
        eps = denoiser(x, t.double().expand(16)).eps
        x = scheduler.step(eps, int(t), x, eta=eta, variance_noise=z).prev_sample
    ours = phased_sample(denoiser, noise, None, times, rng(7), stochasticity)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stochasticity", [0.1, 1.0])
def test_the_only_jump_adds_no_noise(stochasticity: float) -> None:
    denoiser, noise = ring_denoiser(VPSchedule()), randn(8, 2)
    times = torch.tensor([999.0, 0.0])
    noisy = phased_sample(denoiser, noise, None, times, rng(), stochasticity)
    assert torch.equal(noisy, ode_sample(denoiser, noise, None, times))


def test_without_stochasticity_phased_sampling_is_the_ode_sampler() -> None:
    denoiser, noise, times = ring_denoiser(VPSchedule()), randn(8, 2), PHASES.sampling_times(4)
    x = noise
    for t, s in itertools.pairwise(times):
        x = solver_step(denoiser, x, t.expand(8), s.expand(8))
    assert torch.equal(phased_sample(denoiser, noise, None, times), x)
    assert torch.equal(ode_sample(denoiser, noise, None, times), x)


def test_stochastic_samplers_are_functions_of_their_generator_alone() -> None:
    denoiser, noise, times = ring_denoiser(VPSchedule()), randn(8, 2), PHASES.sampling_times(4)
    state = torch.get_rng_state()
    for seeds_differ in (False, True):
        one, two = rng(1), rng(2 if seeds_differ else 1)
        pairs = [
            [phased_sample(denoiser, noise, None, times, g, 0.5) for g in (one, two)],
            [consistency_sample(denoiser, noise, None, times, g) for g in (one, two)],
        ]
        assert all(torch.equal(*pair) != seeds_differ for pair in pairs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stochasticity", [-0.1, 1.5])
def test_stochasticity_outside_its_range_is_refused(stochasticity: float) -> None:
    with pytest.raises(ValueError, match=str(stochasticity)):
        phased_sample(
            ring_denoiser(VPSchedule()),
            randn(2, 2),
            None,
            PHASES.sampling_times(4),
            rng(),
            stochasticity,
        )


def test_samplers_ask_the_network_once_a_step_and_at_the_visited_times_only() -> None:
    times = PHASES.sampling_times(4)
    for sampler in (ode_sample, phased_sample, consistency_sample):
        counted = Counted(ring_denoiser(VPSchedule()))
        sampler(counted, randn(2, 2), None, times)
        assert counted.times == times[:-1].tolist()


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
def test_one_step_sampling_is_a_jump_from_pure_noise_to_the_end(schedule: Schedule) -> None:
    counted, noise = Counted(ring_denoiser(schedule)), randn(8, 2)
    start, end = (torch.full((8,), t) for t in (schedule.t_max, schedule.t_min))
    expected = schedule.jump(ring_denoiser(schedule)(noise, start), end)
    assert torch.equal(one_step_sample(counted, noise), expected)
    assert counted.times == [schedule.t_max]


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), VPSchedule(trajectory_end="clean"), FlowSchedule()]
)
@pytest.mark.parametrize("end_share", [None, 0.5])
def test_consistency_sampling_with_the_exact_function_keeps_the_distribution(
    schedule: Schedule, end_share: float | None
) -> None:
    # An end in the middle makes re-noising from there differ visibly from noising clean data.
    end = schedule.t_min if end_share is None else end_share * schedule.t_max
    mean, std, count = 1.3, 0.6, 20_000
    mixture = GaussianMixture(torch.tensor([[mean]]).double(), torch.tensor([std]).double())
    function = ExactConsistency(AnalyticDenoiser(mixture, schedule), end)
    times = torch.tensor([schedule.t_max, 0.8 * schedule.t_max, 0.6 * schedule.t_max, end])

    def marginal(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * mean, ((alpha * std) ** 2 + sigma**2).sqrt()

    start_mean, start_std = marginal(times[:1])
    noise = start_mean + start_std * randn(count, 1)
    samples = consistency_sample(function, noise, None, times, rng(3))
    end_mean, end_std = marginal(times[-1:])
    assert float(samples.mean()) == pytest.approx(float(end_mean), abs=0.02)
    assert float(samples.std()) == pytest.approx(float(end_std), abs=0.02)


def test_consistency_sampling_jumps_to_the_end_and_renoises_from_there() -> None:
    schedule = VPSchedule()
    denoiser, noise = ring_denoiser(schedule), randn(8, 2)
    top, middle, end = (torch.full((8,), t) for t in (999.0, 599.0, 0.0))
    first = solver_step(denoiser, noise, top, end)
    z = torch.randn(noise.shape, generator=rng(5), dtype=noise.dtype)
    expected = solver_step(denoiser, schedule.renoise(first, end, middle, z), middle, end)
    times = torch.tensor([999.0, 599.0, 0.0])
    assert torch.equal(consistency_sample(denoiser, noise, None, times, rng(5)), expected)


def test_sampling_passes_the_condition_on() -> None:
    denoiser, noise = ring_denoiser(VPSchedule()), randn(64, 2)
    labels = torch.arange(64) % 5
    for sampler in (ode_sample, phased_sample, consistency_sample):
        times = VPSchedule().spaced_times(20)
        samples = sampler(denoiser, noise, {"class_labels": labels}, times)
        nearest = torch.cdist(samples, denoiser.mixture.means).argmin(1)
        assert torch.equal(nearest, labels)
    alone = one_step_sample(denoiser, noise, {"class_labels": labels})
    assert torch.equal(torch.cdist(alone, denoiser.mixture.means).argmin(1), labels)


def test_sampling_leaves_no_graph() -> None:
    noise = randn(2, 2).requires_grad_()
    times = PHASES.sampling_times(4)
    for sampler in (ode_sample, phased_sample, consistency_sample):
        assert not sampler(ring_denoiser(VPSchedule()), noise, None, times).requires_grad
