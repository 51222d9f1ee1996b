"""Sliced Wasserstein distance, for low-dimensional data whose coordinates mean something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.base import Accumulator, Gather, Metric
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
        self.reference: Tensor | None = None

    def prepare(self) -> None:
        """Nothing to fetch."""

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def set_reference(self, samples: Iterable[Tensor]) -> None:
        self.reference = torch.cat([batch.flatten(1).double() for batch in samples])

    def directions(self, dim: int) -> Tensor:
        """The projections, unit vectors ``(K, dim)`` float64."""
        generator = torch_generator(self.seed, "directions")
        vectors = torch.randn(self.num_directions, dim, generator=generator, dtype=torch.float64)
        return vectors / vectors.norm(dim=1, keepdim=True)

    def accumulate(self) -> SlicedAccumulator:
        return SlicedAccumulator(self)

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "directions": self.num_directions, "seed": self.seed}


class SlicedAccumulator(Accumulator):
    """Keeps the samples."""

    def __init__(self, metric: SlicedWasserstein) -> None:
        self.metric = metric
        self.samples: list[Tensor] = []

    def update(self, samples: Tensor) -> None:
        self.samples.append(samples.flatten(1).double())

    def compute(self, gather: Gather | None = None) -> float:
        if not self.samples or self.metric.reference is None:
            raise ValueError("Nothing to compare: set a reference and add samples first.")
        mine = torch.cat(self.samples)
        if gather is not None:
            mine = gather(mine).flatten(0, 1)
        reference = self.metric.reference.to(mine.device)
        directions = self.metric.directions(mine.shape[1]).to(mine.device)
        return float(sliced_wasserstein(mine, reference, directions))
