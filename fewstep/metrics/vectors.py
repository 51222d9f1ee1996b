"""One feature vector of each sample, for metrics that compare sample with sample."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Samples
from fewstep.metrics.rows import Rows


def check_vectors(features: Tensor) -> None:
    """Makes sure that each sample has one vector.

    Raises:
        FewstepError: if each has several, one of every frame.
    """
    if features.ndim != 2:
        raise FewstepError(
            "This metric takes one feature vector of each sample, but the samples are videos and "
            f"these features {tuple(features.shape)} are of their frames. For videos use FrameFID "
            "or a metric over whole clips."
        )


class Vectors(Rows):
    """Features ``(B, D)`` of single samples."""

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        for name in self.outputs:
            check_vectors(features[name])
        super().update(features, samples)
