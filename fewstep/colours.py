"""Random changes of pictures' colours, as DiffAugment has them (Zhao et al. 2020)."""

from __future__ import annotations

from torch import Tensor


def recoloured(
    images: Tensor,
    spread: Tensor,
    brightness: float = 0.5,
    saturation: float = 1.0,
    contrast: float = 0.5,
) -> Tensor:
    """Changes each picture's brightness, then saturation, then contrast, by its own numbers.

    Args:
        images: ``(N, C, H, W)``; grey ones have no saturation.
        spread: three numbers of each in [-1, 1], ``(N, 3)``.
        brightness: adds up to this much.
        saturation: scales the distance from the mean over channels by 1 plus or minus this.
        contrast: scales the distance from the picture's mean by 1 plus or minus this.
    """
    brighter, stronger, harder = spread[:, :, None, None, None].unbind(1)
    images = images + brightness * brighter
    if images.shape[1] > 1:
        grey = images.mean(1, keepdim=True)
        images = grey + (1 + saturation * stronger) * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (1 + contrast * harder) * (images - mean)
