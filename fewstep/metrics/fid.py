"""The Frechet distances over Inception: FID, sFID, and FID of videos' frames."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.metrics.base import Samples
from fewstep.metrics.frechet import FrechetDistance, GaussianStatistics
from fewstep.metrics.inception import InceptionFeatures, value_name
from fewstep.metrics.vectors import check_vectors


class ImageStatistics(GaussianStatistics):
    """Those of images alone: a distance over frames has a name of its own."""

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        check_vectors(features[self.output])
        super().update(features, samples)


class FrameFID(FrechetDistance):
    """FID of all frames of videos, as if each were an image, ``frame_fid``.

    It sees how frames look and nothing of how they move.

    Args:
        features: Inception; torch-fidelity's resize by default.
    """

    def __init__(self, features: InceptionFeatures | None = None) -> None:
        seen = features or InceptionFeatures()
        super().__init__(seen, value_name("frame_fid", seen))


class FID(FrechetDistance):
    """Frechet Inception Distance (Heusel et al., NeurIPS 2017), ``fid`` or ``clean_fid``.

    Values depend on the number of samples: published ones take 50,000 generated images, and those
    of fewer are larger.

    Args:
        features: Inception; torch-fidelity's resize by default.
    """

    def __init__(self, features: InceptionFeatures | None = None) -> None:
        seen = features or InceptionFeatures()
        super().__init__(seen, value_name("fid", seen))

    def statistics(self) -> ImageStatistics:
        return ImageStatistics(self.output)


class SFID(FrechetDistance):
    """FID over features that still know where things are, ``sfid``.

    Nash et al., "Generating Images with Sparse Representations" (ICML 2021), with the layer of
    ADM's evaluation; see :class:`fewstep.metrics.inception_network.InceptionNetwork`.

    Args:
        features: Inception; torch-fidelity's resize by default.
    """

    def __init__(self, features: InceptionFeatures | None = None) -> None:
        seen = features or InceptionFeatures()
        super().__init__(seen, value_name("sfid", seen), output="spatial")

    def statistics(self) -> ImageStatistics:
        return ImageStatistics(self.output)
