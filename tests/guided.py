"""What tests of guidance share: a linear measurement of small vectors with times to walk, a network
with a condition, and a mixture with a rare mode, where more counts than being on the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion import (
    AnalyticDenoiser,
    Backbone,
    Cond,
    Denoiser,
    GaussianMixture,
    Prediction,
    VPSchedule,
)
from fewstep.diffusion.prediction import PredictionType
from fewstep.guidance import Energy, LinearMeasurement, Matrix
from fewstep.guidance.energies import Target

TIMES = torch.tensor([999.0, 699.0, 399.0, 199.0, -1.0]).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Strengths(Energy):
    """An energy with a strength for each sample ``(N,)``, so that one run has them all."""

    energy: Energy
    strengths: Tensor

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        return self.strengths * self.energy(x0, target)


MATRIX = LinearMeasurement(Matrix(randn(2, 4, seed=1)))
NOISE, TARGET = randn(3, 4), randn(3, 2, seed=2)


class Pictures(Backbone):
    """A small convolution with a condition that has a null."""

    sample_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor, level: Tensor | None = None) -> Tensor:
        shift = 0.0 if level is None else level[:, None, None, None]
        return torch.tanh(self.layer(x_t) + shift)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"level": torch.zeros_like(cond["level"])}


def picture_net(kind: PredictionType = "epsilon") -> Denoiser:
    return Denoiser(Pictures(), VPSchedule(trajectory_end="clean"), kind)


DIM, COUNT, STD = 8, 100, 0.3


DIRECTIONS = randn(8, DIM, seed=0)
MEANS = 3 * DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True)
WEIGHTS = torch.tensor([0.02] + [0.14] * 7).double()  # the target is a rare mode
MIXTURE = GaussianMixture(MEANS, torch.full((8,), STD).double(), WEIGHTS)
SCHEDULE = VPSchedule("linear", 1e-4, 0.02, trajectory_end="clean")
EXACT = AnalyticDenoiser(MIXTURE, SCHEDULE)
MIXING = randn(DIM, DIM, seed=1) / DIM**0.5
LABELS = torch.zeros(COUNT).long()


class Features(Energy):
    """Distance to the target in the features of a random network."""

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        assert isinstance(target, Tensor)
        return ((torch.tanh(x0 @ MIXING) - target).square().sum(1) + 1e-20).sqrt()


FEATURES = torch.tanh(MEANS[:1] @ MIXING).expand(COUNT, -1)


class Outcome(NamedTuple):
    """Distance to the target, share on its mode, and distance from the nearest mode, where 1 is
    what samples of the mixture have."""

    loss: float
    accuracy: float
    off_mode: float


def outcome(samples: Tensor) -> Outcome:
    nearest, mode = torch.cdist(samples, MEANS).min(1)
    usual = STD * (DIM - 0.5) ** 0.5
    loss = Features()(samples, FEATURES[:1]).mean()
    share = (mode == 0).double().mean()
    return Outcome(float(loss), float(share), float(nearest.mean()) / usual)


class FlowMap:
    """The best student there can be: it jumps along the true probability flow to clean data."""

    def __init__(self, teacher: AnalyticDenoiser = EXACT) -> None:
        self.teacher, self.schedule = teacher, teacher.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        x0 = self.teacher.flow(x_t, t, torch.full_like(t, self.schedule.t_clean), 25)
        alpha, sigma = self.schedule.levels(t, x_t)
        return Prediction(x0, (x_t - alpha * x0) / sigma)
