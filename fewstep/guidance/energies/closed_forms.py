"""Energies that are formulas: measurements and mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion import GaussianMixture
from fewstep.guidance.energies.base import Energy, Target, needed, safe_norm
from fewstep.guidance.operators import LinearOperator


@dataclass(frozen=True)
class LinearMeasurement(Energy):
    """Agreement with a measurement ``y = A x0 + noise``; the target is ``y``.

    Args:
        operator: ``A``.
        form: ``norm`` is ``|A x0 - y|``, which DPS, FreeDoM and TFG use; ``gaussian`` is the
            negative log-likelihood ``|A x0 - y|^2 / (2 noise_std^2)``.
        noise_std: of the measurement; for ``gaussian`` only.
    """

    operator: LinearOperator
    form: Literal["norm", "gaussian"] = "norm"
    noise_std: float = 1.0

    def encode_images(self, pixels: Tensor) -> Tensor:
        """The measurement of pictures, without noise."""
        return self.operator(pixels)

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        measured = needed(target, self, "the measurement y of each sample", x0)
        residual = self.operator(x0) - measured
        if self.form == "norm":
            return safe_norm(residual)
        return residual.flatten(1).square().sum(1) / (2 * self.noise_std**2)


@dataclass(frozen=True, eq=False)
class MixtureLikelihood(Energy):
    """Closed forms of a Gaussian mixture; the target is the class ``(N,)`` of each sample.

    Args:
        mixture: components with labels.
        form: ``class`` is ``-log p(target | x0)``, what a perfect classifier says; ``density`` is
            ``-log p(x0 | target)`` up to a constant.
        minimum: lower bound of ``density``, which only the genuine Polyak step asks for.
    """

    mixture: GaussianMixture
    form: Literal["class", "density"] = "class"
    minimum: float | None = None

    def __post_init__(self) -> None:
        if self.form == "class":
            object.__setattr__(self, "minimum", 0.0)  # frozen

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        labels = needed(target, self, "the class label of each sample", x0)
        mixture = self.mixture.to(x0)
        square = (x0[:, None, :] - mixture.means).square().sum(-1)  # (N, K)
        log_joint = mixture.weights.log() - x0.shape[1] * mixture.stds.log()
        log_joint = log_joint - 0.5 * square / mixture.stds.square()
        wanted = torch.where(labels[:, None] == mixture.labels, log_joint, -torch.inf)
        density = -wanted.logsumexp(-1)
        return density if self.form == "density" else density + log_joint.logsumexp(-1)
