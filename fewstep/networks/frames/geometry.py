"""Windows and sizes of images, with gradient to their pixels and the same result every time.

torch's own pooling and grid sampling add gradients up in no fixed order on GPUs; what is here does
not, so that a resumed run repeats an undisturbed one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def taken(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns chosen for each image on its own.

    Args:
        images: ``(N, C, H, W)``.
        rows: ``(N, h)``, each image's all different.
        columns: ``(N, w)``, likewise.

    Returns:
        ``(N, C, h, w)``.
    """
    channels, width = images.shape[1], images.shape[3]
    found = images.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    index = columns[:, None, None, :].expand(-1, channels, rows.shape[1], -1)
    return found.gather(3, index)


def whole_number(uniforms: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) as whole numbers from 0 to ``count - 1``."""
    # In a cast to lower precision the largest of them become 1.
    return (uniforms * count).long().clamp_(max=count - 1)


def crop(images: Tensor, size: int, uniforms: Tensor) -> Tensor:
    """A square window ``(N, C, size, size)`` of each image, anywhere with equal chance.

    Args:
        images: ``(N, C, H, W)``, at least ``size`` high and wide.
        uniforms: ``(N, 2)`` in [0, 1), which say where.
    """
    steps = torch.arange(size, device=images.device)
    room = (images.shape[2] - size + 1, images.shape[3] - size + 1)
    corner = [whole_number(uniforms[:, axis : axis + 1], room[axis]) for axis in (0, 1)]
    return taken(images, corner[0] + steps, corner[1] + steps)


def area_resized(images: Tensor, size: int) -> Tensor:
    """Each pixel the mean of those it covers, as ``F.interpolate(mode="area")``.

    In the images' own precision, also within autocast.

    Args:
        images: ``(N, C, H, W)``.
        size: height and width of the result.
    """
    if images.shape[2:] == (size, size):
        return images
    with torch.autocast(images.device.type, enabled=False):
        down, across = (_area_weights(length, size, images) for length in images.shape[2:])
        return down.mT @ images @ across


def _area_weights(length: int, size: int, like: Tensor) -> Tensor:
    """``(length, size)``; a column averages over one pixel's share."""
    each = torch.eye(length, device=like.device, dtype=like.dtype)
    return F.adaptive_avg_pool1d(each[None], size)[0]
