"""Where the exact answer is known: linear measurements of a Gaussian.

The whole sampler is then affine in its noise, so its law is known from one sample more than there
are dimensions, without Monte-Carlo error.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, VPSchedule, ode_sample
from fewstep.guidance import (
    Energy,
    Guidance,
    LinearMeasurement,
    Matrix,
    Recurrence,
    Scheduled,
    guided_sample,
)

DIM, STD = 6, 0.2


class Gaussian:
    """The exact denoiser of a Gaussian with a full covariance.

    Attributes:
        time: at which it was last asked, ``(1,)``.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.schedule = VPSchedule("linear", 1e-4, 0.02, trajectory_end="clean")
        self.mean, self.covariance = mean, covariance
        self.time = torch.zeros(1)

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(DIM)
        return alpha * self.covariance @ torch.linalg.inv(total)

    def uncertainty(self) -> Tensor:
        """Cov[x0 | x_t] at the time last asked."""
        alpha, sigma = self.schedule.alpha(self.time), self.schedule.sigma(self.time)
        return self.covariance - alpha * self.gain(alpha, sigma) @ self.covariance

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        self.time = t[:1].double()
        alpha, sigma = self.schedule.levels(self.time, x_t)
        x0 = self.mean + (x_t - alpha * self.mean) @ self.gain(alpha, sigma).T
        return Prediction(x0, (x_t - alpha * x0) / sigma)


@dataclass(frozen=True)
class Exact(Energy):
    """``-log p(y | x_t)``: the point estimate's loss with its own uncertainty counted."""

    prior: Gaussian
    matrix: Tensor

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        spread = self.matrix @ self.prior.uncertainty() @ self.matrix.T
        precision = torch.linalg.inv(spread + STD**2 * torch.eye(len(self.matrix)))
        residual = x0 @ self.matrix.T - target
        return 0.5 * ((residual @ precision) * residual).sum(1)


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class UnitDraws:
    """Stands where noise is drawn: each draw is a unit of noise in rows of its own.

    What a row ends up as, less the first row, which sees no noise at all, is the sampler's response
    to that unit.
    """

    def __init__(self, count: int) -> None:
        self.first, self.rows = 1 + DIM, 1 + DIM * (1 + count)

    def start(self) -> Tensor:
        noise = torch.zeros(self.rows, DIM).double()
        noise[1 : 1 + DIM] = torch.eye(DIM)
        return noise

    def __call__(self, like: Tensor, generator: object) -> Tensor:
        noise = torch.zeros_like(like)
        noise[self.first : self.first + DIM] = torch.eye(DIM)
        self.first += DIM
        return noise


class Problem:
    """A random prior, three measurements and their exact posterior."""

    def __init__(self, seed: int) -> None:
        root = randn(DIM, DIM, seed=seed) / DIM**0.5
        self.prior = Gaussian(randn(DIM, seed=seed + 100), root @ root.T + 0.1 * torch.eye(DIM))
        self.matrix = randn(3, DIM, seed=seed + 200) / DIM**0.5
        truth = self.prior.mean + root @ randn(DIM, seed=seed + 300)
        self.y = self.matrix @ truth + STD * randn(3, seed=seed + 400)
        covariance = self.prior.covariance
        total = self.matrix @ covariance @ self.matrix.T + STD**2 * torch.eye(3)
        gain = covariance @ self.matrix.T @ torch.linalg.inv(total)
        self.mean = self.prior.mean + gain @ (self.y - self.matrix @ self.prior.mean)
        self.covariance = covariance - gain @ self.matrix @ covariance

    def residual(self, mean: Tensor, covariance: Tensor) -> float:
        """``E |A x - y|^2``"""
        away = (self.matrix @ mean - self.y).square().sum()
        return float(away + (self.matrix @ covariance @ self.matrix.T).trace())

    def law(self, energy: Energy, num_steps: int, repeats: int = 1) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the guided sampler that takes every step so many times."""
        draws = UnitDraws(num_steps * (repeats - 1))
        times = self.prior.schedule.spaced_times(num_steps)
        guidance = Guidance(energy, Scheduled(1.0, "score"), recurrence=Recurrence(repeats))
        y = self.y.expand(draws.rows, -1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fewstep.guidance.sampler.normal_like", draws)
            run = guided_sample(
                self.prior, draws.start(), None, times, guidance, y, largest_move=None
            )
        assert draws.first == draws.rows
        columns = run.samples[1:] - run.samples[0]
        return run.samples[0], columns.T @ columns


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T


def wasserstein(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The 2-Wasserstein distance of two Gaussians."""
    half = root(one[1])
    overlap = root(half @ other[1] @ half)
    square = (one[0] - other[0]).square().sum() + (one[1] + other[1] - 2 * overlap).trace()
    return float(square.clamp_min(0).sqrt())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_exact_guidance_reaches_the_posterior_and_the_point_estimate_does_not(seed: int) -> None:
    problem = Problem(seed)
    posterior = (problem.mean, problem.covariance)
    exact = Exact(problem.prior, problem.matrix)
    point = LinearMeasurement(Matrix(problem.matrix), "gaussian", STD)
    laws = {n: (problem.law(exact, n), problem.law(point, n)) for n in (20, 50, 100)}
    error = {n: wasserstein(law, posterior) for n, (law, _) in laws.items()}
    bias = {n: wasserstein(law, posterior) for n, (_, law) in laws.items()}
    assert error[100] < error[50] < error[20] < 0.25
    assert error[100] < 0.06
    # A bias of the point estimate, not an error of the steps: it stays.
    assert bias[100] > 0.4
    assert abs(bias[100] - bias[50]) < 0.1 * bias[100]
    # It fits the measurement, noise and all, far better than the posterior does.
    expected = problem.residual(*posterior)
    assert problem.residual(*laws[100][0]) == pytest.approx(expected, rel=0.2)
    assert problem.residual(*laws[100][1]) < 0.4 * expected


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_time_travel_keeps_the_limit_of_exact_guidance_and_mends_much_of_a_bias(
    seed: int,
) -> None:
    problem = Problem(seed)
    posterior = (problem.mean, problem.covariance)
    exact = Exact(problem.prior, problem.matrix)
    point = LinearMeasurement(Matrix(problem.matrix), "gaussian", STD)
    error = {n: wasserstein(problem.law(exact, n, 3), posterior) for n in (15, 30, 60)}
    # On a coarse grid it hurts; in the limit it is the posterior all the same.
    assert error[15] > 1.2 * wasserstein(problem.law(exact, 15), posterior)
    assert error[30] < 0.75 * error[15]
    assert error[60] < 0.7 * error[30]
    assert error[60] < 0.13
    # The point estimate's bias becomes much smaller, but stays.
    once = wasserstein(problem.law(point, 30), posterior)
    thrice = [wasserstein(problem.law(point, n, 3), posterior) for n in (30, 60)]
    assert max(thrice) < 0.6 * once
    assert min(thrice) > 0.15


def test_only_the_gradient_through_the_denoiser_spreads_over_what_belongs_together() -> None:
    near = (torch.arange(DIM)[:, None] - torch.arange(DIM)).abs()
    prior = Gaussian(torch.zeros(DIM).double(), 0.9 ** near.double())
    energy = LinearMeasurement(Matrix(torch.eye(DIM).double()[-1:]))
    noise, target = randn(4, DIM, seed=0), torch.full((4, 1), 5.0).double()
    times = torch.tensor([599.0, 299.0]).double()
    unguided = ode_sample(prior, noise, None, times)
    rules = {"state": Scheduled(0.1)}, {"clean": Scheduled(0.1)}
    through, alone = (
        guided_sample(prior, noise, None, times, Guidance(energy, **rule), target).samples
        - unguided
        for rule in rules
    )
    assert alone[:, -1].min() > 0.01
    assert not alone[:, :-1].any()
    alpha, sigma = prior.schedule.alpha(times[:1]), prior.schedule.sigma(times[:1])
    expected = 0.1 * prior.gain(alpha, sigma)[-1]
    torch.testing.assert_close(through, expected.expand(4, -1), rtol=0, atol=1e-8)
