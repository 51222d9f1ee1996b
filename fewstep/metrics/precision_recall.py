"""Precision and recall, density and coverage: fidelity and variety of a set, told apart.

A set's manifold is the union of balls around its samples, each as large as the distance to the
k-th nearest other sample of the set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import compute_device
from fewstep.metrics.base import Better, Features, Metric, Statistics
from fewstep.metrics.inception import InceptionFeatures, value_name
from fewstep.metrics.neighbours import BLOCK, blocks, nearest
from fewstep.metrics.rows import Rows
from fewstep.metrics.vectors import Vectors

VALUES = ("precision", "recall", "density", "coverage")


def manifold_values(
    generated: Tensor, real: Tensor, k: int, density_k: int, block: int = BLOCK
) -> dict[str, float]:
    """All four values of two tables ``(N, D)`` and ``(M, D)``.

    Precision is the share of generated samples in the real manifold, recall that of real samples
    in the generated one (Kynkaanniemi et al., NeurIPS 2019; balls with their surface). Density is
    the number of real balls that a generated sample is in, over ``k``, and coverage the share of
    real balls with a generated sample (Naeem et al., ICML 2020; balls without their surface).

    Args:
        generated, real: the features.
        k: neighbours that precision and recall reach to.
        density_k: neighbours that density and coverage reach to.
        block: vectors of either side whose distances are held at once.
    """
    reach = nearest(real, max(k, density_k), block)
    real_radius, inner_radius = reach[:, k - 1], reach[:, density_k - 1]
    radius = nearest(generated, k, block)[:, k - 1]
    precise = torch.zeros_like(radius, dtype=torch.bool)
    recalled, covered = (torch.zeros_like(real_radius, dtype=torch.bool) for _ in range(2))
    inside = torch.zeros((), dtype=torch.int64, device=real.device)
    for rows, columns, distances in blocks(generated, real, block):
        precise[rows] |= (distances <= real_radius[columns]).any(1)
        recalled[columns] |= (distances <= radius[rows, None]).any(0)
        within = distances < inner_radius[columns]
        covered[columns] |= within.any(0)
        inside += within.sum()
    shares = [share.double().mean() for share in (precise, recalled)]
    density = inside.double() / (density_k * len(generated))
    found = [*shares, density, covered.double().mean()]
    return {name: float(value) for name, value in zip(VALUES, found, strict=True)}


class PrecisionRecall(Metric):
    """``precision``, ``recall``, ``density`` and ``coverage`` over given features.

    Over other features than Inception the names end on the features' name. All four depend on
    the number of samples of both sets.

    Args:
        features: Inception's pooled features by default, as in ADM's evaluation; the first paper
            took VGG16's.
        k: neighbours that the balls of precision and recall reach to.
        density_k: neighbours that the balls of density and coverage reach to.
        most: samples of a set that are kept, those with the smallest numbers; None keeps all.
    """

    def __init__(
        self,
        features: Features | None = None,
        k: int = 3,
        density_k: int = 5,
        most: int | None = 50_000,
    ) -> None:
        self.features: Features = features or InceptionFeatures()
        self.k, self.density_k, self.most = k, density_k, most
        self.names = {value: value_name(value, self.features) for value in VALUES}
        self.better: dict[str, Better] = dict.fromkeys(self.names.values(), "higher")
        if min(k, density_k) < 1:
            raise FewstepError("'k' and 'density_k' of PrecisionRecall are at least 1.")

    def statistics(self) -> Vectors:
        return Vectors(["features"], self.most)

    def check(self, num_samples: int) -> None:
        needed = max(self.k, self.density_k) + 1
        if num_samples < needed:
            raise FewstepError(
                f"Precision and recall need at least {needed} samples, but only {num_samples} are "
                "to be generated. Measure more, or lower 'k' and 'density_k'."
            )

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        made, real = (rows["features"].to(compute_device()) for rows in (generated, reference))
        needed = max(self.k, self.density_k) + 1
        if min(len(made), len(real)) < needed:
            raise FewstepError(
                f"Precision and recall need at least {needed} samples on either side; there are "
                f"{len(made)} generated ones and {len(real)} of the reference."
            )
        found = manifold_values(made, real, self.k, self.density_k)
        return {self.names[value]: number for value, number in found.items()}

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": "precision_recall",
            "k": self.k,
            "density_k": self.density_k,
            "most": self.most,
            "features": self.features.protocol(),
        }
