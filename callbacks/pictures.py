"""Grids of samples as uint8 pictures, no wider than asked for."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

GREY = 128
"""Of the lines between samples; the middle of [-1, 1]."""


def picture(
    decoded: Tensor, columns: int, extent: float = 2.0, max_width: int | None = None
) -> Tensor:
    """One uint8 image ``(3, H, W)`` of a batch.

    Args:
        decoded: images ``(B, C, H, W)``, in [-1, 1] or from :func:`as_pixels`, laid out as a grid;
            or points ``(B, 2)``, drawn as a density over ``[-extent, extent]^2``.
        columns: images a row.
        max_width: of the grid, in pixels; larger ones are made smaller.
    """
    if decoded.ndim == 2:
        bins = torch.histogramdd(
            decoded.float().cpu(), bins=[96, 96], range=[-extent, extent, -extent, extent]
        ).hist.T.flip(0)
        level = 1 - (bins / bins.max().clamp_min(1)).sqrt()
        return (level * 255).to(torch.uint8).expand(3, -1, -1)
    return make_grid(as_pixels(decoded, columns, max_width), columns, padding=1, pad_value=GREY)


def as_pixels(decoded: Tensor, columns: int, max_width: int | None = None) -> Tensor:
    """Samples as uint8 on the CPU, small enough for a grid of a given width.

    Args:
        decoded: ``(B, C, H, W)`` or ``(B, C, F, H, W)`` in [-1, 1]; uint8 passes as it is.
        columns: samples a row of the grid they are meant for.
        max_width: of that grid, in pixels; None leaves every size as it is.
    """
    if decoded.dtype == torch.uint8:
        return decoded.cpu()
    # One sample at a time: forty large ones in float32 would not fit beside the networks.
    return torch.stack([_pixels(x, columns, max_width) for x in decoded])


def _pixels(sample: Tensor, columns: int, max_width: int | None) -> Tensor:
    """One sample ``(C, ..., H, W)`` as uint8."""
    height, width = sample.shape[-2:]
    room = width if max_width is None else max(1, (max_width - 1) // columns - 1)
    sample = sample.float()
    if room < width:
        size = (max(1, round(height * room / width)), room)
        flat = sample.flatten(0, -3).unsqueeze(0)
        small = F.interpolate(flat, size, mode="bilinear", antialias=True)
        sample = small.view(*sample.shape[:-2], *size)
    return ((sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_picture(image: Tensor, path: Path) -> None:
    """Writes a uint8 image ``(3, H, W)`` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
