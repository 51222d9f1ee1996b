"""Where the exact answer is known: linear measurements of a Gaussian."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion import ode_sample
from fewstep.guidance import Guidance, LinearMeasurement, Matrix, Scheduled, guided_sample

from guided import randn
from linear_gaussian import DIM, Gaussian, Problem, wasserstein


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_exact_guidance_reaches_the_posterior_and_the_point_estimate_does_not(seed: int) -> None:
    problem = Problem(seed)
    posterior, exact, point = problem.posterior, problem.exact, problem.point
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
    posterior, exact, point = problem.posterior, problem.exact, problem.point
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
