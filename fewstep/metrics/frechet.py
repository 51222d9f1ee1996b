"""The Frechet distance between feature distributions, streaming and in float64.

It is an FID only over Inception features; over any others it is named by those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.base import Accumulator, Features, Gather, Metric


@dataclass
class GaussianStatistics:
    """Sums from which mean and covariance follow; they add up over batches and ranks."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> GaussianStatistics:
        """No samples of ``dim`` features."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(), zeros(dim), zeros(dim, dim))

    def update(self, features: Tensor) -> None:
        """Adds ``(B, D)`` features."""
        wide = features.double()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and unbiased covariance ``(D, D)``.

        Raises:
            ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError("A covariance needs at least two samples.")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of two Gaussians (Dowson & Landau 1982).

    The root's trace is that of ``(C1^(1/2) C2 C1^(1/2))^(1/2)``, which is symmetric: ``eigh`` is
    exact for singular covariances too, and the result is never negative but for rounding.
    """
    values, vectors = torch.linalg.eigh(cov_1)
    root_1 = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    trace = cov_1.trace() + cov_2.trace() - 2 * inner.clamp_min(0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + trace).clamp_min(0)


class FrechetDistance(Metric):
    """Frechet distance over given features.

    Args:
        features: the feature network, which also names the metric.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self.name = f"frechet_{features.name}"
        self.reference: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        self.features.prepare()

    def load(self, device: torch.device) -> None:
        self.features.load(device)

    def set_reference(self, samples: Iterable[Tensor]) -> None:
        accumulator = FrechetAccumulator(self)
        for batch in samples:
            accumulator.update(batch)
        assert accumulator.statistics is not None
        self.reference = accumulator.statistics.moments()

    def accumulate(self) -> FrechetAccumulator:
        return FrechetAccumulator(self)

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "features": self.features.protocol()}


class FrechetAccumulator(Accumulator):
    """Statistics of the generated side."""

    def __init__(self, metric: FrechetDistance) -> None:
        self.metric = metric
        self.statistics: GaussianStatistics | None = None

    def update(self, samples: Tensor) -> None:
        features = self.metric.features(samples)
        if self.statistics is None:
            self.statistics = GaussianStatistics.empty(features.shape[1], features.device)
        self.statistics.update(features)

    def compute(self, gather: Gather | None = None) -> float:
        if self.statistics is None or self.metric.reference is None:
            raise ValueError("Nothing to compare: set a reference and add samples first.")
        s = self.statistics
        if gather is not None:
            s = GaussianStatistics(*(gather(t).sum(0) for t in (s.count, s.total, s.outer)))
        return float(frechet_distance(*s.moments(), *self.metric.reference))
