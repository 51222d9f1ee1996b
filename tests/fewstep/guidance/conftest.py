"""A small differentiable denoiser that no formula was made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, VPSchedule


class SmoothNet:
    """Predicts noise from ``(B, 4)`` with two random layers."""

    def __init__(self) -> None:
        self.schedule = VPSchedule(trajectory_end="clean")
        generator = torch.Generator().manual_seed(11)
        self.first, self.second = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)

    def noise(self, x: Tensor, t: float | Tensor) -> Tensor:
        return torch.tanh(x @ self.first + t / 1000) @ self.second / 2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        alpha, sigma = self.schedule.levels(t, x_t)
        eps = self.noise(x_t, t[:, None])
        return Prediction((x_t - sigma * eps) / alpha, eps)


@pytest.fixture
def net() -> SmoothNet:
    return SmoothNet()
