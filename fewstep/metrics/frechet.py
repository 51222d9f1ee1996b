"""The Frechet distance between feature distributions, streaming and in float64.

It is an FID only over Inception features; over any others it is named by those.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Features, Metric, Samples, Statistics
from fewstep.metrics.ranks import Ranks

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 512  # that are summed; products of few rows take their time for the D x D sum


class GaussianStatistics(Statistics):
    """Sums from which mean and covariance follow; they add up over batches and ranks.

    Features of video frames ``(B, F, D)`` count as ``B F`` samples.

    Args:
        output: which features, ``(B, D)`` or ``(B, F, D)``.
    """

    def __init__(self, output: str = "features") -> None:
        self.output = output
        self.count: Tensor | None = None
        self.total: Tensor | None = None
        self.outer: Tensor | None = None
        self._waiting: list[Tensor] = []

    def identity(self) -> Hashable:
        return (type(self), self.output)

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        self.add(features[self.output])

    def add(self, features: Tensor) -> None:
        """Adds features ``(B, ..., D)``."""
        self._waiting.append(features.detach().flatten(0, -2))
        if sum(map(len, self._waiting)) >= ROWS_AT_ONCE:
            self._sum()

    def _sum(self) -> None:
        """Sums what waits."""
        if not self._waiting:
            return
        wide = torch.cat(self._waiting).double()
        self._waiting = []
        if self.count is None or self.total is None or self.outer is None:
            self.count = wide.new_zeros(())
            self.total = wide.new_zeros(wide.shape[1])
            self.outer = wide.new_zeros(wide.shape[1], wide.shape[1])
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer.addmm_(wide.T, wide)

    def merged(self, ranks: Ranks) -> Self:
        self._sum()
        found = type(self)(self.output)
        found.count = ranks.sum(self.count)
        found.total = ranks.sum(self.total)
        found.outer = ranks.sum(self.outer)
        return found

    def tensors(self) -> dict[str, Tensor]:
        self._sum()
        if self.count is None or self.total is None or self.outer is None:
            raise ValueError("There are no samples.")
        return {"count": self.count, "total": self.total, "outer": self.outer}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._waiting = []
        self.count, self.total, self.outer = (tensors[n] for n in ("count", "total", "outer"))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and unbiased covariance ``(D, D)``.

        Raises:
            FewstepError: for fewer than two samples.
        """
        self._sum()
        if self.count is None or self.count < 2:
            raise FewstepError("A Frechet distance needs at least two samples on either side.")
        count, total, outer = self.tensors().values()
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return mean, covariance


def _root(covariance: Tensor) -> Tensor:
    """``R`` ``(D, r)`` with ``R R^T`` the covariance ``(D, D)``, whose rank ``r`` may be less."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:  # of full rank; several times faster than eigenvectors
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    there = values > rounding
    return vectors[:, there] * values[there].sqrt()


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of two Gaussians (Dowson & Landau 1982).

    The root's trace is that of ``(R^T C2 R)^(1/2)`` for any ``R R^T = C1``, which is symmetric: its
    eigenvalues are exact for singular covariances too, and the result is never negative but for
    rounding.
    """
    root = _root(cov_1)
    inner = torch.linalg.eigvalsh(root.T @ cov_2 @ root)
    trace = cov_1.trace() + cov_2.trace() - 2 * inner.clamp_min(0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + trace).clamp_min(0)


def warn_if_few(name: str, sides: Mapping[str, GaussianStatistics]) -> None:
    """Warns of sets with too few samples for a covariance of full rank, which takes ``D + 1``.

    The distance is still that of the sets' Gaussians, but far above the one of larger sets.
    """
    for side, statistics in sides.items():
        count, total, _ = statistics.tensors().values()
        if count < len(total) + 1:
            logger.warning(
                "%s: %d %s samples are fewer than the %d that a covariance of %d features takes. "
                "The value is much larger than one of more samples would be; compare it with "
                "nothing of another size.",
                name,
                int(count),
                side,
                len(total) + 1,
                len(total),
            )


class FrechetDistance(Metric):
    """Frechet distance over given features.

    Args:
        features: the feature network, which also names the metric.
        name: of its value; ``frechet_`` and the features' name by default.
        output: which of the network's outputs.
    """

    def __init__(
        self, features: Features, name: str | None = None, output: str = "features"
    ) -> None:
        self.features: Features = features
        self.name = name or f"frechet_{features.name}"
        self.output = output
        self.better: dict[str, Better] = {self.name: "lower"}

    def statistics(self) -> GaussianStatistics:
        return GaussianStatistics(self.output)

    def check(self, num_samples: int) -> None:
        if num_samples < 2:
            raise FewstepError(f"{self.name} needs at least two samples, not {num_samples}.")

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, GaussianStatistics)
        assert isinstance(reference, GaussianStatistics)
        mean, covariance = generated.moments()
        others = (moment.to(mean.device) for moment in reference.moments())
        warn_if_few(self.name, {"generated": generated, "reference": reference})
        return {self.name: float(frechet_distance(mean, covariance, *others))}

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "output": self.output, "features": self.features.protocol()}
