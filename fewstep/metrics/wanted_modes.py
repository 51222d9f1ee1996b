"""Is a mixture's wanted mode reached, and filled as it should be?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.analytic import GaussianMixture
from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Metric, Reference, Samples, Statistics
from fewstep.metrics.means import Means

NAMES = ("mode_accuracy", "mode_scatter")


class WantedModes(Metric):
    """Samples of a Gaussian mixture against the component of the class that each was to be of.

    ``mode_accuracy``: share of samples whose likeliest component is of the wanted class.
    ``mode_scatter``: of these, the mean of ``|x - mean|^2 / (D std^2)``, which is 1 of exact
    samples of the component: less where they crowd about its mean, more where they leave it.
    ``mode_scatter_error``: ``|log mode_scatter|``, 0 of exact ones. Both are left out where no
    sample is of its class.

    Args:
        mixture: whose labels are the classes.
        target: name of the condition that tells the wanted class, ``(B,)``.
    """

    reference: ClassVar[Reference] = "none"
    name = "mode_accuracy"

    def __init__(self, mixture: GaussianMixture, target: str = "class_labels") -> None:
        self.mixture, self.target = mixture, target
        self.needs_conditions = (target,)
        self.better: dict[str, Better] = {
            "mode_accuracy": "higher",
            "mode_scatter_error": "lower",
        }
        self.own_values = frozenset([*self.better, "mode_scatter"])

    def statistics(self) -> Means:
        return Means(NAMES, self._values)

    def _values(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        if samples.cond is None or self.target not in samples.cond:
            raise FewstepError(
                f"WantedModes looks for each sample's '{self.target}', which these samples were "
                "not given; leave it out of the Evaluation callback's `metrics`."
            )
        x, mixture = samples.pixels.double(), self.mixture.to(samples.pixels.double())
        if x.shape[1:] != mixture.means.shape[1:]:
            raise FewstepError(
                f"WantedModes has a mixture in {mixture.means.shape[1]} dimensions; the samples "
                f"are of shape {tuple(x.shape[1:])}."
            )
        square = (x[:, None] - mixture.means).square().sum(-1) / mixture.stds.square()  # (B, K)
        log_joint = mixture.weights.log() - x.shape[1] * mixture.stds.log() - 0.5 * square
        likeliest = log_joint.argmax(1)
        hit = mixture.labels[likeliest] == samples.cond[self.target].to(x.device)
        hit &= x.isfinite().all(1)
        scatter = square.gather(1, likeliest[:, None])[:, 0] / x.shape[1]
        return [hit, torch.where(hit, scatter, 0.0)]

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        means = generated.means()
        share, inside = means["mode_accuracy"], means["mode_scatter"]
        if not inside:  # no sample is of its component, or all are its mean
            return {"mode_accuracy": share}
        scatter = inside / share
        error = abs(math.log(scatter))
        return {"mode_accuracy": share, "mode_scatter": scatter, "mode_scatter_error": error}

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "target": self.target,
            "means": self.mixture.means.tolist(),
            "weights": self.mixture.weights.tolist(),
            "stds": self.mixture.stds.tolist(),
        }
