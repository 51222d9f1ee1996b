"""The reverse process against Bayes' rule, exact Gaussians and diffusers' own scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fewstep.diffusion import (
    AnalyticDenoiser,
    Cond,
    FlowSchedule,
    GaussianMixture,
    Prediction,
    Schedule,
    VPSchedule,
    ancestral_sample,
    ancestral_times,
    variational_bound,
)
from fewstep.diffusion.ancestral import between, log_variances, posterior_mean
from fewstep.errors import FewstepError

LINEAR = VPSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LINEAR, VPSchedule(), FlowSchedule()])
def test_the_kernel_is_bayes_rule(schedule: Schedule) -> None:
    """``q(x_s | x_t, x_0)`` is the product of two Gaussians in ``x_s``: precisions add up."""
    t, s = torch.tensor([900.0, 400.0, 7.0]), torch.tensor([650.0, 399.0, 2.0])
    x0, x_t = randn(3, 5), randn(3, 5, seed=1)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.levels(s, x0), schedule.levels(t, x0)
    carried = alpha_t / alpha_s
    forward = sigma_t.square() - (carried * sigma_s).square()
    precision = 1 / sigma_s.square() + carried.square() / forward
    mean = (alpha_s * x0 / sigma_s.square() + carried * x_t / forward) / precision
    torch.testing.assert_close(posterior_mean(schedule, x0, x_t, t, s), mean, rtol=1e-8, atol=1e-9)
    least, greatest = log_variances(schedule, t, s)
    torch.testing.assert_close(least, -precision.log()[:, 0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(greatest, forward.log()[:, 0], rtol=1e-7, atol=1e-7)


def test_a_step_to_clean_data_has_no_least_variance_and_arrives_at_the_estimate() -> None:
    t, clean = torch.tensor([0.0]), torch.tensor([LINEAR.t_clean])
    assert log_variances(LINEAR, t, clean)[0].item() == -math.inf
    x0 = randn(1, 4)
    torch.testing.assert_close(posterior_mean(LINEAR, x0, randn(1, 4, seed=1), t, clean), x0)


class ExactVariance:
    """Gaussian data's exact denoiser, which tells the variance of ``q(x_s | x_t)`` exactly."""

    def __init__(self, std: float, times: Tensor) -> None:
        self.schedule, self.std = LINEAR, std
        self.exact = AnalyticDenoiser(
            GaussianMixture(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([std]).double()),
            LINEAR,
        )
        self.following = dict(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        return self.exact(x_t, t)

    def with_variance(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor]:
        s = torch.full_like(t, self.following[float(t[0])])
        return self(x_t, t), told(best_variance(t, s, self.std), t, s)[:, None].expand_as(x_t)


def best_variance(t: Tensor, s: Tensor, std: float) -> Tensor:
    """Variance of ``x_s`` given ``x_t`` for Gaussian data: the kernel's and the estimate's."""
    alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
    of_x0 = 1 / (1 / std**2 + (alpha / sigma).square())
    least, greatest = log_variances(LINEAR, t, s)
    weight = LINEAR.alpha(s) * greatest.exp() / sigma.square()
    return least.exp() + weight.square() * of_x0


def told(variance: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """What a network has to say for a variance to come out."""
    least, greatest = log_variances(LINEAR, t, s)
    return 2 * (variance.log() - least) / (greatest - least) - 1


@pytest.mark.parametrize("num_steps", [2, 5, 40])
def test_the_right_variances_sample_a_gaussian_exactly_in_any_number_of_steps(
    num_steps: int,
) -> None:
    """But for the last step, which is a mean: it lacks what is uncertain about data at index 0."""
    std, count = 0.4, 40_000
    times = ancestral_times(LINEAR, num_steps)
    first = torch.full((count, 1), float(times[0]), dtype=torch.float64)
    alpha, sigma = LINEAR.alpha(first[0]), LINEAR.sigma(first[0])
    start = (alpha.square() * std**2 + sigma.square()).sqrt() * randn(count, 3)
    x = ancestral_sample(ExactVariance(std, times), start, None, times, rng(1))
    zero = torch.zeros(1)
    lost = 1 / (1 / std**2 + (LINEAR.alpha(zero) / LINEAR.sigma(zero)).square())
    assert float(x.std()) == pytest.approx(float((std**2 - lost).sqrt()), rel=0.01)


def test_the_greatest_variance_is_used_where_none_is_told_and_is_too_much_in_few_steps() -> None:
    times = ancestral_times(LINEAR, 5)
    denoiser = ExactVariance(0.4, times)
    start = randn(20_000, 3)
    x = ancestral_sample(denoiser.exact, start, None, times, rng(1))
    variance = torch.ones(1, dtype=torch.float64)
    for t, s in zip(times[:-1, None], times[1:, None], strict=True):  # the chain is linear
        gain = denoiser.exact(torch.ones(1, 3).double(), t).x0[:, :1]
        slope = posterior_mean(LINEAR, gain, torch.ones(1, 1).double(), t, s)[0]
        last = s == LINEAR.t_clean
        variance = slope.square() * variance + log_variances(LINEAR, t, s)[1].exp() * ~last
    assert float(x.var()) == pytest.approx(float(variance), rel=0.03)
    assert float(x.var()) > 1.1 * 0.4**2


class Fixed:
    """A nonlinear stand-in for a network that tells variances, as DiT does."""

    def __init__(self, schedule: VPSchedule) -> None:
        self.schedule = schedule

    def output(self, x_t: Tensor, t: Tensor) -> Tensor:
        eps = (1.3 * x_t + t.to(x_t)[:, None, None, None] / 1000).sin()
        return torch.cat([eps, (3 * x_t).cos()], dim=1)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        return self.with_variance(x_t, t)[0]

    def with_variance(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor]:
        eps, where = self.output(x_t, t).chunk(2, dim=1)
        alpha, sigma = self.schedule.levels(t, x_t)
        return Prediction((x_t - sigma * eps) / alpha, eps), where


@pytest.mark.parametrize("num_steps", [7, 250, 1000])
def test_learned_variances_sample_as_diffusers_own_scheduler(num_steps: int) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    scheduler.set_timesteps(num_steps)
    times = ancestral_times(LINEAR, num_steps)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    denoiser, x = Fixed(LINEAR), torch.randn(2, 4, 3, 3, generator=rng())
    found = ancestral_sample(denoiser, x, None, times, rng(1))
    draws = rng(1)
    for t in scheduler.timesteps:
        output = denoiser.output(x, t.expand(2))
        x = scheduler.step(output, t, x, generator=draws).prev_sample  # type: ignore[union-attr]
    torch.testing.assert_close(found, x, rtol=2e-3, atol=2e-3)


def test_the_bound_is_the_divergence_of_two_gaussians() -> None:
    t = torch.tensor([1.0, 10.0, 600.0, 999.0])
    x0, noise = randn(4, 3, 2), randn(4, 3, 2, seed=1)
    x_t = LINEAR.add_noise(x0, noise, t)
    predicted, where = x0 + 0.1 * randn(4, 3, 2, seed=2), randn(4, 3, 2, seed=3).tanh()
    found = variational_bound(LINEAR, x0, x_t, t, predicted, where)
    least, greatest = log_variances(LINEAR, t, t - 1)
    log_std = between(where, least, greatest) / 2
    true = torch.distributions.Normal(
        posterior_mean(LINEAR, x0, x_t, t, t - 1), (least / 2).exp()[:, None, None]
    )
    mean = posterior_mean(LINEAR, predicted, x_t, t, t - 1)
    divergence = torch.distributions.kl_divergence(
        true, torch.distributions.Normal(mean, log_std.exp())
    )
    expected = divergence.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_at_index_zero_the_bound_is_the_likelihood_of_8_bit_values() -> None:
    """Over all 256 of them the likelihoods sum to one, whatever mean and variance."""
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    t = torch.zeros(256)
    for centre, place in [(0.3, 1.0), (-1.2, 0.0), (0.999, -1.0)]:
        predicted, where = torch.full_like(values, centre), torch.full_like(values, place)
        bits = variational_bound(LINEAR, values, values, t, predicted, where)
        assert float((-bits * math.log(2)).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_what_minimises_the_bound_is_the_best_variance() -> None:
    """For Gaussian data the best step variance has a closed form; training must find it."""
    std = 0.4
    for index in (1.0, 30.0, 400.0, 950.0):
        t = torch.full((50_000,), index)
        x0 = std * randn(50_000, 1)
        x_t = LINEAR.add_noise(x0, randn(50_000, 1, seed=1), t)
        data = GaussianMixture(torch.zeros(1, 1).double(), torch.tensor([std]).double())
        predicted = AnalyticDenoiser(data, LINEAR)(x_t, t).x0
        one, before = t[:1], t[:1] - 1
        best = told(best_variance(one, before, std), one, before)
        places = best + torch.tensor([-0.05, 0.0, 0.05], dtype=torch.float64)
        low, at, high = (
            variational_bound(LINEAR, x0, x_t, t, predicted, place.expand_as(x_t)).mean()
            for place in places
        )
        assert at < low
        assert at < high


def test_schedules_without_train_indices_and_too_many_steps_are_refused() -> None:
    with pytest.raises(FewstepError, match="sampler: ode"):
        ancestral_times(FlowSchedule(), 10)
    with pytest.raises(FewstepError, match="1001 steps"):
        ancestral_times(LINEAR, 1001)
