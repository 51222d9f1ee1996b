"""What is seen of moving digits: the mark on them, how sharp they are, and where they are.

For grey samples of light digits on black, as in :mod:`datamodules.moving_clips`, whose motion and
looks are known: methods that take motion from one set and looks from another (Zhai et al., "Motion
Consistency Model", NeurIPS 2024) should lose the mark, gain sharpness and keep the track.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.amounts import Amount
from fewstep.metrics.base import Better, Metric, Reference, Samples, Statistics, to_uint8
from fewstep.metrics.means import Means
from fewstep.watermark import MARK_OPACITY, watermark

# Of the robust fit: pixels that are off by more than a few grey levels hardly count.
OFF = 0.03
REFITS = 10
LEVEL = 1 / 255


def light(pixels: Tensor) -> Tensor:
    """Grey samples in [-1, 1] as 8-bit light from 0, black, to 1: ``(B, F, H, W)`` float64.

    An image is a video of one frame.

    Raises:
        FewstepError: for samples with colours, and for frames that are no squares.
    """
    if pixels.ndim not in (4, 5) or pixels.shape[1] != 1 or pixels.shape[-1] != pixels.shape[-2]:
        raise FewstepError(
            "Metrics of moving digits take square grey images (B, 1, H, H) or videos "
            f"(B, 1, F, H, H); the samples are {tuple(pixels.shape)}."
        )
    return to_uint8(pixels).double().view(len(pixels), -1, *pixels.shape[-2:]) / 255


def opacity_like(frames: Tensor) -> Tensor:
    """The mark's opacity ``(H, W)`` for frames ``(..., H, W)``."""
    return torch.from_numpy(watermark(frames.shape[-1])).to(frames)


def mark_strength(frames: Tensor) -> Tensor:
    """How much of the mark is in each clip: 1 is all of it, 0 nothing.

    The mark stands still and digits only add light: so the least light that a pixel has over time
    is ``b + a (1 - b) o``, with the opacity ``o`` and an even background ``b``, but where a digit
    never leaves it. Fits ``a`` by least squares, again and again with less weight for pixels that
    are off (Cauchy's weights).

    Args:
        frames: light ``(B, F, H, W)``.

    Returns:
        ``(B,)``, at most the strength at which the mark is all white, either way.
    """
    opacity = opacity_like(frames).flatten()
    least = frames.amin(1).flatten(1)
    weights = torch.ones_like(least)
    for _ in range(REFITS + 1):
        total = weights.sum(1, keepdim=True)
        off_opacity = opacity - (weights * opacity).sum(1, keepdim=True) / total
        mean_least = (weights * least).sum(1, keepdim=True) / total
        covariance = (weights * off_opacity * (least - mean_least)).sum(1, keepdim=True)
        slope = covariance / (weights * off_opacity.square()).sum(1, keepdim=True)
        residual = least - mean_least - slope * off_opacity
        weights = 1 / (residual.square() + OFF**2)
    background = least - residual - slope * opacity
    room = (1 - background[:, 0]).clamp_min(LEVEL)
    return (slope[:, 0] / room).clamp(-1 / MARK_OPACITY, 1 / MARK_OPACITY)


def unmarked(frames: Tensor) -> Tensor:
    """Clips ``(B, F, H, W)`` without what there is of the mark in each, in [0, 1]."""
    mark = mark_strength(frames).clamp_min(0)[:, None, None, None] * opacity_like(frames)
    return ((frames - mark) / (1 - mark).clamp_min(LEVEL)).clamp(0, 1)


class WatermarkEnergy(Metric):
    """``watermark_energy``: how much of the mark is in the clips, their mean :func:`mark_strength`.

    1 in ``watermarked`` data, 0 in ``clear`` ones. Flicker lowers it, since it looks at the darkest
    moment of each pixel: by an eighth where its standard deviation is 5 of 255 levels.
    """

    reference: ClassVar[Reference] = "none"
    name = "watermark_energy"

    def __init__(self) -> None:
        self.better: dict[str, Better] = {self.name: "lower"}

    def statistics(self) -> Means:
        return Means([self.name], self.strengths)

    def strengths(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        """The mark's strength ``(B,)`` in each clip, alone in a list."""
        if samples.pixels.ndim != 5:
            raise FewstepError(
                "A mark is told from digits by standing still, so watermark_energy takes videos; "
                "the samples are images. Leave it out."
            )
        return [mark_strength(light(samples.pixels))]

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        return generated.means()

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "pixels": "8-bit", "mark": "fitted to the least light"}


class Sharpness(Amount):
    """``sharpness``: mean squared Laplacian of the frames over their variance.

    Both over pixels that, with their neighbours, lie outside of the mark. It does not depend on how
    light the digits are, nor on how many there are. Noise is sharp too, 20 if there is nothing
    else: so the data's own is what to aim for, and ``sharpness_error`` tells how far off it is.
    """

    nothing = "The reference has no edges at all"

    def __init__(self) -> None:
        super().__init__("sharpness")

    def amounts(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        frames = light(samples.pixels)
        inner = frames[..., 1:-1, 1:-1]
        across = frames[..., 1:-1, 2:] + frames[..., 1:-1, :-2] - 2 * inner
        down = frames[..., 2:, 1:-1] + frames[..., :-2, 1:-1] - 2 * inner
        free = opacity_like(frames) == 0
        # Rows and columns at the mark's border have a neighbour in it.
        free = (
            free[1:-1, 1:-1] & free[1:-1, 2:] & free[1:-1, :-2] & free[2:, 1:-1] & free[:-2, 1:-1]
        )
        edges = (across + down)[..., free].square().mean((1, 2))
        variance = inner[..., free].var((1, 2), correction=0)
        return [edges / variance.clamp_min(LEVEL**2)]
