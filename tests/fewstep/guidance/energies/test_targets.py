"""Targets may lie elsewhere than samples do: energies take them along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewstep.guidance import (
    ClassLabel,
    EmbeddingDistance,
    Energy,
    FinalPosition,
    LinearMeasurement,
    MapDistance,
    Matrix,
    MixtureLikelihood,
    ObstacleAvoidance,
    Reward,
)
from fewstep.networks import ring


class Product(nn.Module):
    """A reward that is told something of each sample."""

    def forward(self, x0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (x0 * target).sum(1)


CASES: list[tuple[Energy, tuple[int, ...], Any]] = [
    (ClassLabel(nn.Linear(4, 3).eval()), (2, 4), torch.tensor([0, 1])),
    (Reward(Product().eval()), (2, 4), torch.ones(2, 4)),
    (LinearMeasurement(Matrix(torch.eye(4))), (2, 4), torch.ones(2, 4)),
    (MixtureLikelihood(ring(5)), (2, 2), torch.tensor([0, 1])),
    (MapDistance(nn.Identity().eval()), (2, 1, 4, 4), torch.ones(2, 1, 4, 4)),
    (EmbeddingDistance(nn.Identity().eval()), (2, 1, 4, 4), torch.ones(2, 16)),
    (FinalPosition(), (2, 5, 2), torch.ones(2, 2)),
    (ObstacleAvoidance(1.0), (2, 5, 2), torch.ones(2, 2)),
]


@pytest.mark.parametrize(
    ("energy", "shape", "target"), CASES, ids=[type(case[0]).__name__ for case in CASES]
)
def test_a_target_follows_the_samples_to_their_device(
    energy: Energy, shape: tuple[int, ...], target: torch.Tensor
) -> None:
    """The device without values stands for an accelerator."""
    losses = energy(torch.empty(shape, device="meta"), target)
    assert losses.device.type == "meta"
    assert losses.shape == (2,)
