from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fewstep.diffusion import (
    AnalyticDenoiser,
    FlowSchedule,
    GaussianMixture,
    Schedule,
    VPSchedule,
    ode_sample,
)

SCHEDULES = [VPSchedule(), FlowSchedule()]
LEVELS = [(0.9, math.sqrt(1 - 0.81)), (0.3, math.sqrt(1 - 0.09)), (0.6, 0.4), (0.1, 0.9)]


def wide(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plane() -> GaussianMixture:
    """Four unequal components of three classes in two dimensions."""
    return GaussianMixture(
        wide([[-1, 0.5], [1, 1], [0, -1.5], [2, 0]]),
        wide([0.3, 0.5, 0.2, 0.4]),
        wide([0.1, 0.4, 0.3, 0.2]),
        torch.tensor([0, 1, 2, 1]),
    )


def line() -> GaussianMixture:
    """Three unequal components in one dimension."""
    return GaussianMixture(wide([[-1], [0.8], [2]]), wide([0.3, 0.2, 0.5]), wide([0.3, 0.5, 0.2]))


def gaussian(mean: float = 1.3, std: float = 0.6) -> GaussianMixture:
    return GaussianMixture(wide([[mean]]), wide([std]))


def at(time: float, count: int) -> Tensor:
    return torch.full((count,), time, dtype=torch.float64)


def log_marginal(mixture: GaussianMixture, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The log-density of ``alpha x0 + sigma eps``, from torch's own distributions."""
    std = ((alpha * mixture.stds).square() + sigma**2).sqrt()[:, None].expand_as(mixture.means)
    components = Independent(Normal(alpha * mixture.means, std), 1)
    return MixtureSameFamily(Categorical(mixture.weights), components).log_prob(x)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_noise_is_the_score_of_the_marginal(alpha: float, sigma: float) -> None:
    mixture, x = plane(), (2 * randn(64, 2)).requires_grad_()
    (score,) = torch.autograd.grad(log_marginal(mixture, x, alpha, sigma).sum(), x)
    prediction = mixture.predict(x.detach(), (torch.tensor(alpha), torch.tensor(sigma)))
    torch.testing.assert_close(prediction.eps, -sigma * score, rtol=1e-6, atol=1e-6)
    tweedie = (x.detach() + sigma**2 * score) / alpha
    torch.testing.assert_close(prediction.x0, tweedie, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_prediction_is_the_posterior_mean_by_quadrature(alpha: float, sigma: float) -> None:
    mixture, x = line(), wide([[-1.2], [0.0], [0.4], [1.9]])
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = log_marginal(mixture, grid[:, None], 1.0, 0.0)
    posterior = (prior - 0.5 * ((x - alpha * grid) / sigma).square()).softmax(1)
    prediction = mixture.predict(x, (wide([alpha]), wide([sigma])))
    torch.testing.assert_close(prediction.x0[:, 0], posterior @ grid, rtol=0, atol=1e-9)
    noise = posterior @ (-alpha * grid) / sigma + x[:, 0] / sigma
    torch.testing.assert_close(prediction.eps[:, 0], noise, rtol=0, atol=1e-9)


def test_a_gaussian_is_denoised_in_closed_form() -> None:
    mean, std, alpha, sigma = 1.3, 0.6, 0.7, 0.5
    x = randn(16, 1)
    variance = (alpha * std) ** 2 + sigma**2
    prediction = gaussian(mean, std).predict(x, (torch.tensor(alpha), torch.tensor(sigma)))
    torch.testing.assert_close(
        prediction.eps, sigma * (x - alpha * mean) / variance, rtol=0, atol=1e-7
    )


def test_denoising_a_class_is_denoising_its_own_sub_mixture() -> None:
    mixture, x, levels = plane(), 2 * randn(32, 2), (wide([0.6]), wide([0.8]))
    for label in range(3):
        own = mixture.labels == label
        alone = GaussianMixture(
            mixture.means[own], mixture.stds[own], mixture.weights[own] / mixture.weights[own].sum()
        )
        conditional = mixture.predict(x, levels, torch.full((32,), label))
        torch.testing.assert_close(conditional.x0, alone.predict(x, levels).x0)
        torch.testing.assert_close(conditional.eps, alone.predict(x, levels).eps)
    assert mixture.num_classes == 3
    null = mixture.predict(x, levels, torch.full((32,), 3))
    torch.testing.assert_close(null.x0, mixture.predict(x, levels).x0)


def test_rows_have_their_own_levels_and_labels() -> None:
    denoiser, x = AnalyticDenoiser(plane(), VPSchedule()), randn(4, 2)
    t, labels = wide([999, 500, 20, 0]), torch.tensor([0, 3, 1, 2])
    together = denoiser(x, t, {"class_labels": labels})
    for row in range(4):
        pick = slice(row, row + 1)
        alone = denoiser(x[pick], t[pick], {"class_labels": labels[pick]})
        torch.testing.assert_close(together.x0[pick], alone.x0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_prediction_splits_the_sample(schedule: Schedule) -> None:
    x, t = 2 * randn(8, 2), torch.linspace(0.001, 1, 8).double() * schedule.t_max
    prediction = AnalyticDenoiser(plane(), schedule)(x, t)
    alpha, sigma = schedule.levels(t, x)
    torch.testing.assert_close(
        alpha * prediction.x0 + sigma * prediction.eps, x, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gaussian_flow_is_what_runge_kutta_finds(schedule: Schedule) -> None:
    closed = AnalyticDenoiser(gaussian(), schedule)
    # The same Gaussian in two halves is integrated numerically.
    halves = GaussianMixture(wide([[1.3], [1.3]]), wide([0.6, 0.6]))
    x, t, s = 2 * randn(16, 1), at(schedule.t_max, 16), at(schedule.t_min, 16)
    exact = closed.flow(x, t, s)
    integrated = AnalyticDenoiser(halves, schedule).flow(x, t, s)
    torch.testing.assert_close(integrated, exact, rtol=0, atol=1e-8)
    back = closed.flow(exact, s, t)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.9, 0.3), (0.2, 0.7)])
def test_the_flow_on_a_line_is_the_quantile_transform(
    schedule: Schedule, start: float, end: float
) -> None:
    mixture, x = line(), torch.linspace(-2.5, 2.5, 31, dtype=torch.float64)
    t, s = at(start * schedule.t_max, 31), at(end * schedule.t_max, 31)
    levels = [(schedule.alpha(time), schedule.sigma(time)) for time in (t, s)]
    exact = mixture.quantile_flow(x, *levels)
    integrated = AnalyticDenoiser(mixture, schedule).flow(x[:, None], t, s)[:, 0]
    torch.testing.assert_close(integrated, exact, rtol=0, atol=1e-8)
    assert (exact - x).abs().max() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_flow_carries_the_noisy_marginal_to_the_data(schedule: Schedule) -> None:
    mixture, count = plane(), 2_000
    samples, _ = mixture.sample(count, torch.Generator().manual_seed(0))
    t, s = at(0.8 * schedule.t_max, count), at(schedule.t_min, count)
    x_t = schedule.add_noise(samples, randn(count, 2, seed=1), t)
    arrived = AnalyticDenoiser(mixture, schedule).flow(x_t, t, s, num_steps=60)
    torch.testing.assert_close(arrived.mean(0), samples.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(arrived.T.cov(), samples.T.cov(), rtol=0, atol=0.08)


def test_the_cdf_is_that_of_the_noisy_marginal() -> None:
    alpha, sigma = wide([0.6]), wide([0.8])
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = log_marginal(line(), x[:, None], 0.6, 0.8).exp()
    integral = torch.cumulative_trapezoid(density, x)
    torch.testing.assert_close(line().cdf(x, (alpha, sigma))[1:], integral, rtol=0, atol=1e-7)


def test_samples_have_the_mixtures_moments_and_labels() -> None:
    mixture, count = plane(), 100_000
    samples, labels = mixture.sample(count, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    offset = mixture.means - mean
    cov = (offset.T * mixture.weights) @ offset
    cov = cov + (mixture.weights * mixture.stds.square()).sum() * torch.eye(2)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(samples.T.cov(), cov, rtol=0, atol=0.02)
    share = labels.bincount() / count
    torch.testing.assert_close(share.double(), wide([0.1, 0.6, 0.3]), rtol=0, atol=0.01)
    class_zero = samples[labels == 0].mean(0)
    torch.testing.assert_close(class_zero, mixture.means[0], rtol=0, atol=0.02)


def test_samples_are_a_function_of_the_generator() -> None:
    first, again, other = (
        plane().sample(8, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def solver_error(mixture: GaussianMixture, schedule: Schedule, x: Tensor, num_points: int) -> float:
    """Root mean square distance between the solver on a grid and the true flow."""
    denoiser = AnalyticDenoiser(mixture, schedule)
    end = torch.tensor([schedule.t_min], dtype=torch.float64)
    arrived = ode_sample(
        denoiser, x, None, torch.cat([schedule.grid_times(num_points).flip(0), end])
    )
    levels = [(schedule.alpha(t), schedule.sigma(t)) for t in (wide([schedule.t_max]), end)]
    truth = mixture.quantile_flow(x[:, 0], *levels)
    return float((arrived[:, 0] - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    ("num_points", "figure"), [(20, 0.0565), (40, 0.0299), (100, 0.0127), (200, 0.0065)]
)
def test_ddim_misses_the_true_flow_by_the_known_figures(num_points: int, figure: float) -> None:
    levels = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    noise = torch.special.ndtri(levels)  # a standard normal, without chance
    error = solver_error(gaussian(1.3, 0.6), VPSchedule(), noise, num_points)
    assert error == pytest.approx(figure, rel=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_solver_converges_to_the_true_flow_at_first_order(schedule: Schedule) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    errors = [solver_error(line(), schedule, x, num_points) for num_points in (50, 100, 200)]
    slopes = [math.log2(finer / coarser) for coarser, finer in itertools.pairwise(errors)]
    assert slopes == pytest.approx([-1, -1], abs=0.12)
    assert errors[-1] < 0.02
