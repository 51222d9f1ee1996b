"""Guidance of a student that the framework has distilled itself, next to the best there could be.

The data are a ring of Gaussians, whose exact denoiser is the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import AnalyticDenoiser, Denoiser, DenoiserLike, VPSchedule
from fewstep.guidance import (
    Capped,
    Energy,
    Guidance,
    Polyak,
    Scheduled,
    consistency_steps,
    guided_sample,
)
from fewstep.networks import RingMixture, ring
from lightning_modules import ConsistencyDistillation

from guided import FlowMap, randn
from rings import distil

STD, COUNT, UPDATES = 0.2, 500, 600
SCHEDULE, MIXTURE = VPSchedule(), ring(5, std=STD)
TEACHER = AnalyticDenoiser(MIXTURE, SCHEDULE)
MIXING = randn(2, 8, seed=1)
TARGET = torch.tanh(MIXTURE.means[:1] @ MIXING)


class Features(Energy):
    """Distance to the first mode in the features of a random network."""

    def __call__(self, x0: Tensor, target: object) -> Tensor:
        return ((torch.tanh(x0.double() @ MIXING) - TARGET).square().sum(1) + 1e-20).sqrt()


class Outcome(NamedTuple):
    """Distance to the target, share on its mode, and distance from the nearest mode, where 1 is
    what data have."""

    loss: float
    accuracy: float
    off_mode: float


@pytest.fixture(scope="module")
def student() -> Denoiser:
    """Distilled from the teacher by consistency, in a quarter of a minute."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ConsistencyDistillation(
            lambda: Denoiser(RingMixture(SCHEDULE, 5, std=STD), SCHEDULE, "epsilon"),
            num_grid_points=10,
            solver_substeps=4,
            weighting="velocity",
            ema_decay=None,
        )
        module.configure_model()
    distil(module, MIXTURE, UPDATES, 256, 5e-3)
    return module.student.requires_grad_(False).eval()


def outcome(denoiser: DenoiserLike, num_steps: int, strength: float) -> Outcome:
    """Of consistency sampling, each of whose levels is guided four times."""
    rule = Capped(Polyak(strength), 0.2) if strength else Scheduled(0.0)
    samples = guided_sample(
        denoiser,
        randn(COUNT, 2, seed=5),
        None,
        SCHEDULE.spaced_times(num_steps),
        Guidance(Features(), rule, inner_steps=4),
        None,
        torch.Generator().manual_seed(9),
        consistency_steps(SCHEDULE),
    ).samples
    nearest, mode = torch.cdist(samples, MIXTURE.means).min(1)
    usual = STD * (torch.pi / 2) ** 0.5
    found = Features()(samples, None).mean(), (mode == 0).double().mean(), nearest.mean() / usual
    return Outcome(*map(float, found))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_distilled_student_is_guided_sooner_and_nearer_the_modes_than_posterior_means(
    student: Denoiser, num_steps: int
) -> None:
    ours, mean, best = (outcome(d, num_steps, 0.2) for d in (student, TEACHER, FlowMap(TEACHER)))
    plain = outcome(student, num_steps, 0.0)
    assert ours.accuracy > mean.accuracy + 0.02
    assert ours.loss < 0.92 * mean.loss
    assert ours.off_mode < 0.9 * mean.off_mode
    assert ours.off_mode < 1.05 * plain.off_mode
    assert ours.accuracy > plain.accuracy + 0.25
    # It is not far from what a perfect student makes of the same gradients.
    assert ours.accuracy > best.accuracy - 0.1
    assert ours.off_mode < 1.9 * best.off_mode
