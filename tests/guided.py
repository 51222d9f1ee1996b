"""A linear measurement of small vectors, and times to walk, that tests of guidance share."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.guidance import LinearMeasurement, Matrix

TIMES = torch.tensor([999.0, 699.0, 399.0, 199.0, -1.0]).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MATRIX = LinearMeasurement(Matrix(randn(2, 4, seed=1)))
NOISE, TARGET = randn(3, 4), randn(3, 2, seed=2)
