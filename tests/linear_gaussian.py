"""Linear measurements of a Gaussian, whose posterior is known.

A guided sampler is then affine in its noise, so its law is known from one sample more than there
are dimensions, without Monte-Carlo error.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, VPSchedule
from fewstep.guidance import (
    DDIM,
    Energy,
    Guidance,
    LinearMeasurement,
    Matrix,
    Recurrence,
    Scheduled,
    guided_sample,
)

from guided import randn

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

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance."""
        return self.mean, self.covariance

    @property
    def exact(self) -> Exact:
        """``-log p(y | x_t)``"""
        return Exact(self.prior, self.matrix)

    @property
    def point(self) -> LinearMeasurement:
        """``-log p(y | x0)``, for which the point estimate stands in."""
        return LinearMeasurement(Matrix(self.matrix), "gaussian", STD)

    def law(
        self, energy: Energy, num_steps: int, repeats: int = 1, eta: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the guided sampler that takes every step so many times."""
        fresh = repeats * (num_steps - 1) if eta else 0  # a step to clean data draws none
        draws = UnitDraws(num_steps * (repeats - 1) + fresh)
        times = self.prior.schedule.spaced_times(num_steps)
        guidance = Guidance(energy, Scheduled(1.0, "score"), recurrence=Recurrence(repeats))
        y = self.y.expand(draws.rows, -1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fewstep.guidance.sampler.normal_like", draws)
            run = guided_sample(
                self.prior,
                draws.start(),
                None,
                times,
                guidance,
                y,
                base=DDIM(eta),
                largest_move=None,
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
