"""Energies: how far clean samples are from what is wanted, one loss for each sample.

Samples are in the data's own range, pixels in [-1, 1]. What is wanted comes with every call as
``target``, a row for each sample, so that one energy serves all batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion import GaussianMixture
from fewstep.errors import FewstepError
from fewstep.guidance.operators import LinearOperator


class Energy(ABC):
    """A loss of clean samples."""

    @property
    def minimum(self) -> float:
        """The loss's lower bound, which the genuine Polyak step needs."""
        return 0.0

    @abstractmethod
    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        """Losses ``(N,)``.

        Args:
            x0: clean samples ``(N, ...)``; ``N`` is a multiple of the batch when there are several
                views of each sample.
            target: what is wanted, ``(N, ...)``, or None if the energy needs none.
        """


def _needed(target: Tensor | None, energy: object, what: str) -> Tensor:
    if target is None:
        raise FewstepError(f"{type(energy).__name__} needs a target: {what}.")
    return target


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample ``(N,)``, with a gradient of zero at zero."""
    square = x.flatten(1).square().sum(1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


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

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        measured = _needed(target, self, "the measurement y of each sample")
        residual = self.operator(x0) - measured
        if self.form == "norm":
            return safe_norm(residual)
        return residual.flatten(1).square().sum(1) / (2 * self.noise_std**2)


@dataclass(frozen=True, eq=False)
class ClassLabel(Energy):
    """Cross-entropy of a classifier; the target is the class ``(N,)`` of each sample.

    Args:
        classifier: takes clean samples and returns logits ``(N, classes)``. Set it to evaluation
            mode: in training mode, batch statistics tie samples together.
        shift, factor: the classifier sees ``(x0 + shift) * factor``; 1 and 0.5 turn [-1, 1] into
            [0, 1].
    """

    classifier: nn.Module
    shift: float = 0.0
    factor: float = 1.0

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        labels = _needed(target, self, "the class label of each sample")
        if self.classifier.training:
            raise FewstepError(
                "The classifier of a ClassLabel energy is in training mode, where samples may "
                "depend on their batch mates. Call classifier.eval() first."
            )
        logits = self.classifier((x0 + self.shift) * self.factor)
        return F.cross_entropy(logits, labels.long(), reduction="none")


@dataclass(frozen=True, eq=False)
class MixtureLikelihood(Energy):
    """Closed forms of a Gaussian mixture; the target is the class ``(N,)`` of each sample.

    Args:
        mixture: components with labels.
        form: ``class`` is ``-log p(target | x0)``, what a perfect classifier says; ``density`` is
            ``-log p(x0 | target)`` up to a constant, whose lower bound has to be given.
    """

    mixture: GaussianMixture
    form: Literal["class", "density"] = "class"
    minimum: float = 0.0

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        labels = _needed(target, self, "the class label of each sample")
        mixture = self.mixture.to(x0)
        square = (x0[:, None, :] - mixture.means).square().sum(-1)  # (N, K)
        log_joint = mixture.weights.log() - x0.shape[1] * mixture.stds.log()
        log_joint = log_joint - 0.5 * square / mixture.stds.square()
        wanted = torch.where(labels[:, None] == mixture.labels, log_joint, -torch.inf)
        density = -wanted.logsumexp(-1)
        return density if self.form == "density" else density + log_joint.logsumexp(-1)
