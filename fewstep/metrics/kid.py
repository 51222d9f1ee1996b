"""Kernel Inception Distance: how far two sets are apart in the mean of a kernel, without bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import compute_device
from fewstep.metrics.base import Better, Features, Metric, Statistics
from fewstep.metrics.inception import InceptionFeatures, value_name
from fewstep.metrics.rows import Rows
from fewstep.metrics.vectors import Vectors


def squared_mmd(
    first: Tensor, second: Tensor, degree: int, gamma: float | None, coef: float
) -> Tensor:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, equation 3).

    Args:
        first, second: ``(N, D)`` each, under the kernel ``(gamma x y + coef)^degree``.
        degree: of the kernel.
        gamma: of the kernel; ``1 / D`` for None.
        coef: of the kernel.
    """
    count = len(first)
    scale = 1 / first.shape[1] if gamma is None else gamma

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T * scale + coef) ** degree

    within = sum(k.sum() - k.trace() for k in (kernel(x, x) for x in (first, second)))
    between = kernel(first, second).sum()
    return within / (count * (count - 1)) - 2 * between / count**2


class KID(Metric):
    """Kernel Inception Distance (Binkowski et al., "Demystifying MMD GANs", ICLR 2018).

    ``kid`` and ``kid_std``, mean and spread over random subsets; the draws are torch-fidelity's,
    so equal features give equal values. The value is unbiased, can be slightly negative, and
    small sets make it noisier but not larger. Over other features than Inception it is called
    ``kernel_distance_`` and the features' name.

    Args:
        features: Inception by default.
        subsets: how many are drawn.
        subset_size: samples of either side in one.
        degree: of the polynomial kernel ``(gamma x y + coef)^degree``.
        gamma: of the kernel; one over the number of features by default.
        coef: of the kernel.
        seed: of the draws.
        most: samples of a set that are kept, those with the smallest numbers; None keeps all.
    """

    def __init__(
        self,
        features: Features | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        degree: int = 3,
        gamma: float | None = None,
        coef: float = 1.0,
        seed: int = 2020,
        most: int | None = 50_000,
    ) -> None:
        self.features: Features = features or InceptionFeatures()
        known = isinstance(self.features, InceptionFeatures)
        self.name = value_name("kid" if known else "kernel_distance", self.features)
        self.subsets, self.subset_size = subsets, subset_size
        self.degree, self.gamma, self.coef = degree, gamma, coef
        self.seed, self.most = seed, most
        self.better: dict[str, Better] = {self.name: "lower", f"{self.name}_std": "lower"}
        if subset_size < 2 or subsets < 1:
            raise FewstepError("KID takes at least one subset ('subsets') of two ('subset_size').")

    def statistics(self) -> Vectors:
        return Vectors(["features"], self.most)

    def check(self, num_samples: int) -> None:
        if num_samples < self.subset_size:
            raise FewstepError(
                f"{self.name} draws subsets of {self.subset_size} samples, but only {num_samples} "
                "are to be generated. Measure more samples, or lower its 'subset_size'."
            )

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        tables = [rows["features"].to(compute_device()) for rows in (generated, reference)]
        if min(map(len, tables)) < self.subset_size:
            raise FewstepError(
                f"{self.name} draws subsets of {self.subset_size} samples, but there are "
                f"{len(tables[0])} generated ones and {len(tables[1])} of the reference. Measure "
                "more samples, or lower its 'subset_size'."
            )
        draws = np.random.RandomState(self.seed)
        found = []
        for _ in range(self.subsets):
            chosen = [
                table[draws.choice(len(table), self.subset_size, replace=False)].double()
                for table in tables
            ]
            found.append(squared_mmd(chosen[0], chosen[1], self.degree, self.gamma, self.coef))
        values = torch.stack(found)
        mean, std = float(values.mean()), float(values.std(correction=0))
        return {self.name: mean, f"{self.name}_std": std}

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "subsets": self.subsets,
            "subset_size": self.subset_size,
            "kernel": {"degree": self.degree, "gamma": self.gamma, "coef": self.coef},
            "seed": self.seed,
            "most": self.most,
            "features": self.features.protocol(),
        }
