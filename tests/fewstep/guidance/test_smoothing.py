from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import DDIM, Energy, Objective, Smoothing, plan_steps

STEP = plan_steps(VPSchedule(), VPSchedule().spaced_times(4), DDIM())[2]


class Wall(Energy):
    """Nearly a sign: bounded by 1 and steep at 0."""

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        return torch.tanh(x0[:, 0] / 0.01)


class Band(Energy):
    """Nearly 1 beyond a distance of 0.1 and -1 within it."""

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        return torch.tanh((x0[:, 0].abs() - 0.1) / 0.01)


class Square(Energy):
    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        return x0.square().sum(1)


def slopes(smoothing: Smoothing, points: Tensor, energy: Energy) -> Tensor:
    """Gradients of the smoothed loss at ``points (N,)``, all with the same noise."""
    rows = points.double()[:, None].requires_grad_()
    draws = [torch.Generator().manual_seed(7) for _ in points]
    losses = Objective(energy, smoothing=smoothing).drawn(rows, None, STEP, draws)
    return torch.autograd.grad(losses(rows).sum(), rows)[0][:, 0]


def test_smoothing_bounds_the_slope_and_the_curvature_of_a_bounded_loss() -> None:
    sigma = 0.1
    smoothing = Smoothing(sigma, copies=60_000, relative=False, reduction="mean")
    points = torch.linspace(-0.25, 0.25, 21)
    slope = slopes(smoothing, points, Wall())
    # The bounds are reached: by a sign for the slope, by a band for the curvature.
    assert float(slope.max()) == pytest.approx(math.sqrt(2 / math.pi) / sigma, rel=0.03)
    curvature = (slopes(smoothing, points, Band()).diff() / points.diff()).max()
    sharp = 4 * math.exp(-0.5) / math.sqrt(2 * math.pi) / sigma**2
    assert float(curvature) == pytest.approx(sharp, rel=0.05)
    # 2 / sigma^2 bounds it; the 2 / sigma printed in Shen et al., proposition 3.2, does not.
    assert 2 / sigma < curvature < 2 / sigma**2


def test_the_noise_is_a_share_of_the_level_of_the_step_or_a_fixed_one() -> None:
    like = torch.zeros(2, 3).double()
    draws = torch.Generator().manual_seed(0)
    for relative, std in ((True, 0.5 * STEP.sigma), (False, 0.5)):
        noise = Smoothing(0.5, copies=4000, relative=relative).draw(like, STEP, draws)
        assert noise is not None
        assert noise.shape == (4000, 2, 3)
        assert float(noise.std()) == pytest.approx(std, rel=0.03)
    assert Smoothing(0.0, copies=4).draw(like, STEP, draws) is None


def test_averages_of_likelihoods_and_of_losses_differ_as_they_should() -> None:
    # E[(x + s z)^2] = x^2 + s^2; -log E[exp(-(x + s z)^2)] = x^2 / (1 + 2 s^2) + constant
    points, s = torch.tensor([0.5, 1.0, 2.0]), 0.4
    for reduction, expected in (("mean", 2 * points), ("log_mean_exp", 2 * points / 1.32)):
        smoothing = Smoothing(s, 200_000, relative=False, reduction=reduction)  # type: ignore[arg-type]
        slope = slopes(smoothing, points, Square())
        torch.testing.assert_close(slope, expected.double(), rtol=0, atol=0.02)


def test_no_copies_are_refused() -> None:
    with pytest.raises(FewstepError, match="copies: 0"):
        Smoothing(0.1, copies=0)


class Reader(Energy):
    """A network's opinion, and what it was computed in."""

    def __init__(self) -> None:
        self.network = torch.nn.Linear(3, 1).requires_grad_(False)
        self.seen: list[torch.dtype] = []

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        found = self.network(x0)
        self.seen.append(found.dtype)
        return found[:, 0]


def test_energies_are_computed_in_full_precision_whatever_the_denoiser_runs_in() -> None:
    energy, x = Reader(), torch.randn(4, 3)
    losses = Objective(energy).drawn(x, None, STEP, None)
    plain = losses(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert energy.network(x).dtype == torch.bfloat16
        assert torch.equal(losses(x), plain)
    assert energy.seen == [torch.float32] * 2
