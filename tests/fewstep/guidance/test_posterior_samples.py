"""Samples of guided samplers that draw noise on their way, against an exact posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fewstep.guidance import DDIM, Energy, Guidance, Scheduled, guided_sample, lgd_mc

from guided import Strengths, randn
from linear_gaussian import DIM, STD, Gaussian, Problem, wasserstein

SCORE = Scheduled(1.0, "score")


def slow(*values: float) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Smeared(Energy):
    """What LGD-MC tends to with more and more copies: ``x0`` is uncertain by ``sigma(t)``."""

    prior: Gaussian
    matrix: Tensor

    def __call__(self, x0: Tensor, target: object) -> Tensor:
        assert isinstance(target, Tensor)
        spread = self.prior.schedule.sigma(self.prior.time).square() * self.matrix @ self.matrix.T
        precision = torch.linalg.inv(spread + STD**2 * torch.eye(len(self.matrix)))
        residual = x0 @ self.matrix.T - target
        return 0.5 * ((residual @ precision) * residual).sum(1)


def samples(problem: Problem, guidance: Guidance, times: Tensor, count: int, eta: float) -> Tensor:
    noise, y = randn(count, DIM, seed=5), problem.y.expand(count, -1)
    draws, base = torch.Generator().manual_seed(9), DDIM(eta)
    return guided_sample(
        problem.prior, noise, None, times, guidance, y, draws, base, largest_move=None
    ).samples


@pytest.mark.parametrize("seed", [1, slow(2), slow(3)])
def test_with_fresh_noise_too_exact_guidance_reaches_the_posterior(seed: int) -> None:
    problem = Problem(seed)
    posterior, smeared = problem.posterior, Smeared(problem.prior, problem.matrix)
    error = {n: wasserstein(problem.law(problem.exact, n, eta=1), posterior) for n in (25, 50, 100)}
    bias = {n: wasserstein(problem.law(problem.point, n, eta=1), posterior) for n in (50, 100)}
    blurred = wasserstein(problem.law(smeared, 100, eta=1), posterior)
    assert error[100] < 0.65 * error[50] < 0.65**2 * error[25]
    assert error[100] < 0.1
    # The point estimate's bias stays, and LGD-MC's limit, which is no posterior either, is between.
    assert bias[100] > max(0.15, 0.75 * bias[50])
    assert 1.1 * error[100] < blurred < 0.7 * bias[100]


@pytest.mark.parametrize("seed", [1, slow(2)])
def test_lgd_mc_tends_to_its_closed_form_with_more_copies(seed: int) -> None:
    """From the same noise, sample by sample: whatever is left is the Monte-Carlo error."""
    problem = Problem(seed)
    times = problem.prior.schedule.spaced_times(40)
    limit = Guidance(Smeared(problem.prior, problem.matrix), SCORE)
    wanted = samples(problem, limit, times, 200, 1.0)
    copies = {n: replace(lgd_mc(problem.point, copies=n), state=SCORE) for n in (1, 10, 100)}
    found = {n: samples(problem, lgd, times, 200, 1.0) for n, lgd in copies.items()}
    away = {n: float((x - wanted).square().mean().sqrt()) for n, x in found.items()}
    law = {n: wasserstein((x.mean(0), x.T.cov()), problem.posterior) for n, x in found.items()}
    assert away[10] < 0.85 * away[1]
    assert away[100] < 0.55 * away[10]
    assert away[100] < 0.12
    assert law[100] < law[10] < law[1]


def mismatch(problem: Problem, found: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic of squared whitened samples, which should be chi-squared.

    In units in which 1.63 is exceeded by one true set of samples in a hundred.
    """
    whiten = torch.linalg.cholesky(problem.covariance)
    white = torch.linalg.solve_triangular(whiten, (found - problem.mean).T, upper=False)
    square = white.square().sum(0).sort().values
    mass = torch.special.gammainc(torch.tensor(DIM / 2).double(), square / 2)
    rank = torch.arange(len(mass) + 1).double() / len(mass)
    return float(torch.maximum(rank[1:] - mass, mass - rank[:-1]).max()) * len(mass) ** 0.5


@pytest.mark.parametrize(("seed", "eta"), [(1, 0.0), (2, 1.0), slow(3, 0.0), slow(3, 1.0)])
def test_the_posteriors_regions_hold_as_many_samples_as_they_should(seed: int, eta: float) -> None:
    """Only at the right strength; a wrong one is plain to see."""
    problem, count = Problem(seed), 400
    # Most of the steps are where little noise is left, so that their own error is no matter.
    times = 1000 * torch.linspace(1, 0, 241).double().square() - 1
    strengths = torch.tensor([0.5, 0.7, 1.0, 1.5, 2.0]).double().repeat_interleave(count)
    energy = Strengths(problem.exact, strengths)
    found = samples(problem, Guidance(energy, SCORE), times, len(strengths), eta)
    half, less, right, more, double = (mismatch(problem, x) for x in found.split(count))
    assert right < 1.63
    assert min(half, less, more, double) > 2.2
