"""Sliced Wasserstein distance, for low-dimensional data whose coordinates mean something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.base import Better, Metric, Statistics
from fewstep.metrics.rows import Rows
from fewstep.seeding import torch_generator


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions of the 1-Wasserstein distance between projections.

    Args:
        first, second: samples ``(N, D)`` and ``(M, D)``; compared at ``min(N, M)`` quantiles.
        directions: unit vectors ``(K, D)``.
    """
    count = min(len(first), len(second))
    levels = (torch.arange(count, dtype=first.dtype, device=first.device) + 0.5) / count
    quantiles = [torch.quantile(x @ directions.T, levels, dim=0) for x in (first, second)]
    return (quantiles[0] - quantiles[1]).abs().mean()


class SlicedWasserstein(Metric):
    """Sliced 1-Wasserstein distance between decoded samples as they are.

    Args:
        num_directions: random projections, fixed by ``seed``.
        seed: of the projections.
    """

    name = "sliced_wasserstein"

    def __init__(self, num_directions: int = 64, seed: int = 0) -> None:
        self.num_directions = num_directions
        self.seed = seed
        self.better: dict[str, Better] = {self.name: "lower"}

    def statistics(self) -> Rows:
        return Rows(["pixels"])

    def directions(self, dim: int) -> Tensor:
        """The projections, unit vectors ``(K, dim)`` float64."""
        generator = torch_generator(self.seed, "directions")
        vectors = torch.randn(self.num_directions, dim, generator=generator, dtype=torch.float64)
        return vectors / vectors.norm(dim=1, keepdim=True)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        first, second = (rows["pixels"].flatten(1).double() for rows in (generated, reference))
        value = sliced_wasserstein(first, second, self.directions(first.shape[1]))
        return {self.name: float(value)}

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "directions": self.num_directions, "seed": self.seed}
