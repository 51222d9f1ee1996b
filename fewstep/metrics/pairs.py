"""Two sets of the same noise, sample against sample: does the picture stay when the steps change?

Wang et al., "Phased Consistency Models" (NeurIPS 2024), section 4: CONSISTENCY is the mean cosine
of CLIP features of one-step and sixteen-step samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.base import Better, Features, Metric, Reference, Samples, Statistics, to_uint8
from fewstep.metrics.clip import CLIPFeatures
from fewstep.metrics.rows import NUMBERS, Rows

PIXELS = "uint8"


class PixelRows(Rows):
    """Images or videos themselves as 8-bit values, a bounded number of them."""

    of_samples: ClassVar[bool] = True

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        if samples.pixels.ndim < 4:
            raise FewstepError(
                "This metric compares images or videos; the samples are vectors "
                f"{tuple(samples.pixels.shape)}."
            )
        super().update({**features, PIXELS: to_uint8(samples.pixels)}, samples)


class Paired(Metric):
    """The mean over samples of something that two samples of the same noise have together.

    Args:
        name: of the value.
        output: which feature is compared.
        better: which way.
        pairs: to compare, those with the smallest numbers.
    """

    reference: ClassVar[Reference] = "pairs"

    def __init__(self, name: str, output: str, better: Better, pairs: int) -> None:
        self.name = name
        self.output = output
        self.pairs = pairs
        self.better: dict[str, Better] = {name: better}

    def statistics(self) -> Rows:
        return Rows([self.output], self.pairs)

    @abstractmethod
    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Of paired rows ``(N, ...)`` the values ``(N,)``."""

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        """The mean of all pairs."""
        return {self.name: float(self.compare(*self.paired(generated, reference)).double().mean())}

    def paired(self, generated: Statistics, reference: Statistics | None) -> tuple[Tensor, Tensor]:
        """The rows ``(N, ...)`` of either set, pair beside pair, which are known by their numbers.

        Raises:
            FewstepError: if the sets are not of the same numbers or sizes.
        """
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        if not torch.equal(generated[NUMBERS], reference[NUMBERS]):
            raise FewstepError(
                f"{self.name} compares pairs of the same noise, but the two sets have "
                f"{len(generated)} and {len(reference)} samples of different numbers. Draw both "
                "with the same seed and number of samples."
            )
        first, second = generated[self.output], reference[self.output]
        if first.shape != second.shape:
            raise FewstepError(
                f"{self.name} compares pairs of one shape; these have {tuple(first.shape[1:])} "
                f"and {tuple(second.shape[1:])}."
            )
        return first, second

    def protocol(self) -> dict[str, Any]:
        looks = {} if self.features is None else {"features": self.features.protocol()}
        return {"metric": self.name, "compared": self.output, "pairs": self.pairs, **looks}


class Consistency(Paired):
    """Mean cosine of the features of pairs, ``consistency_`` and the features' name.

    Of videos the mean over frames.

    Args:
        features: CLIP by default.
        output: which of the network's outputs.
        pairs: to compare.
    """

    def __init__(
        self,
        features: Features | None = None,
        output: str = "features",
        pairs: int = 256,
    ) -> None:
        self.features: Features = features or CLIPFeatures()
        super().__init__(f"consistency_{self.features.name}", output, "higher", pairs)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        cosines = F.cosine_similarity(first.double(), second.double(), dim=-1)
        return cosines.view(len(cosines), -1).mean(1)


def _mean_square(first: Tensor, second: Tensor) -> Tensor:
    """The mean square difference of each pair of 8-bit samples ``(N, ...)``, float64."""
    found = [
        (one.double() - other.double()).square().mean()
        for one, other in zip(first, second, strict=True)  # one at a time: videos are large
    ]
    return torch.stack(found)


class PairedPixels(Paired):
    """A comparison of 8-bit pixels.

    Args:
        name: of the value.
        better: which way.
        pairs: to compare; both sets' pixels are kept in memory.
    """

    def __init__(self, name: str, better: Better, pairs: int) -> None:
        super().__init__(name, PIXELS, better, pairs)

    def statistics(self) -> Rows:
        return PixelRows([self.output], self.pairs)


class PairedPSNR(PairedPixels):
    """Mean peak signal-to-noise ratio of pairs in dB, ``paired_psnr``.

    Equal pairs count as if one value differed by one of 255 steps, so that the mean is finite.

    Args:
        pairs: to compare; both sets' pixels are kept in memory.
    """

    def __init__(self, pairs: int = 256) -> None:
        super().__init__("paired_psnr", "higher", pairs)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        least = 1 / first[0].numel()
        return 10 * torch.log10(255**2 / _mean_square(first, second).clamp_min(least))


class PairedDistance(PairedPixels):
    """Mean root-mean-square difference of pairs, ``paired_rmse``, where 1 is black from white.

    Args:
        pairs: to compare; both sets' pixels are kept in memory.
    """

    def __init__(self, pairs: int = 256) -> None:
        super().__init__("paired_rmse", "lower", pairs)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return _mean_square(first, second).sqrt() / 255
