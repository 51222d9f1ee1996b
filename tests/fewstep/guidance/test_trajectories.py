"""Trajectories with a Gaussian process for a prior, whose denoiser is a formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, VPSchedule
from fewstep.guidance import (
    Capped,
    FinalPosition,
    Guidance,
    Normalised,
    ObstacleAvoidance,
    Scheduled,
    Sum,
    guided_sample,
)

FRAMES = 24


class Walks:
    """Paths ``(B, F, 2)`` about a mean path, whose frames are correlated as an AR(1)'s."""

    def __init__(self, mean: Tensor, std: float = 1.0, memory: float = 0.9) -> None:
        self.schedule = VPSchedule(trajectory_end="clean")
        place = torch.arange(FRAMES).double()
        self.covariance = std**2 * memory ** (place[:, None] - place).abs()
        self.mean = mean.double()

    def gain(self, alpha: float, sigma: float) -> Tensor:
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(FRAMES).double()
        return alpha * torch.linalg.solve(noisy, self.covariance).T

    def posterior(self, alpha: float, sigma: float) -> Tensor:
        """Covariance of the clean frames given the noisy ones."""
        return self.covariance - alpha * self.gain(alpha, sigma) @ self.covariance

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        alpha, sigma = float(self.schedule.alpha(t)[0]), float(self.schedule.sigma(t)[0])
        x0 = self.mean + self.gain(alpha, sigma) @ (x_t - alpha * self.mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, FRAMES, 2, generator=generator, dtype=torch.float64)


STILL = Walks(torch.zeros(FRAMES, 2))
GOAL = torch.tensor([2.0, -1.0]).double()


def moved(guidance: Guidance, times: Tensor, count: int = 3) -> Tensor:
    """What guidance changes, ``(B, F, 2)``."""
    idle = Guidance(guidance.energy, Scheduled(0.0))
    target = GOAL.expand(count, -1)
    runs = [
        guided_sample(STILL, noise(count), None, times, one, target) for one in (guidance, idle)
    ]
    return runs[0].samples - runs[1].samples


def test_the_clean_estimate_moves_in_its_last_frame_alone() -> None:
    times = torch.tensor([500.0, 450.0]).double()
    change = moved(Guidance(FinalPosition(), clean=Scheduled(0.1)), times)
    assert not change[:, :-1].any()
    assert bool((change[:, -1] != 0).all())


def test_a_gradient_through_the_denoiser_is_spread_by_the_posterior_covariance() -> None:
    times = torch.tensor([500.0, 450.0]).double()
    change = moved(Guidance(FinalPosition(), Scheduled(0.1)), times)
    alpha, sigma = (float(f(times)[0]) for f in (STILL.schedule.alpha, STILL.schedule.sigma))
    gap = STILL(noise(3), times[:1].expand(3)).x0[:, -1] - GOAL
    spread = alpha / sigma**2 * STILL.posterior(alpha, sigma)[:, -1]
    torch.testing.assert_close(change, -0.1 * 2 * spread[None, :, None] * gap[:, None])
    assert float(spread[-3] / spread[-1]) > 0.4  # far from the last frame alone


def test_guided_walks_follow_the_mean_of_the_exact_conditional_process() -> None:
    times = VPSchedule(trajectory_end="clean").spaced_times(100)
    change = moved(Guidance(FinalPosition(), Scheduled(1.0, "score")), times, 200).mean(0)
    gain = STILL.covariance[:, -1] / STILL.covariance[-1, -1]
    exact = gain[:, None] * GOAL
    assert float((change - exact).norm() / exact.norm()) < 0.15
    assert float(change[:-1].norm() / exact[:-1].norm()) > 0.85


def test_fewer_paths_enter_an_obstacle_that_guidance_avoids() -> None:
    line = torch.linspace(0, 6, FRAMES)[:, None].expand(-1, 2)
    walks, count = Walks(line, std=0.4), 100
    obstacle = ObstacleAvoidance(1.0, margin=0.2, steepness=5.0)
    centre, goal = torch.full((count, 2), 3.0).double(), torch.full((count, 2), 6.0).double()
    energy = Sum({"goal": FinalPosition(), "obstacle": obstacle}, {"goal": 10.0})
    aims = {"goal": goal, "obstacle": centre}
    times = walks.schedule.spaced_times(50)
    entered, missed = [], []
    for rule in (Scheduled(0.0), Capped(Normalised(0.4), 0.1)):
        paths = guided_sample(walks, noise(count), None, times, Guidance(energy, rule), aims)
        entered.append(float(obstacle.hits(paths.samples, centre).double().mean()))
        missed.append(float(FinalPosition()(paths.samples, goal).mean()))
    assert entered[0] > 0.9
    assert entered[1] < 0.3, entered
    assert missed[1] < missed[0]
    assert math.isfinite(missed[1])
