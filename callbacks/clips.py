"""Samples of video as animations that any browser, and TensorBoard, plays."""

from __future__ import annotations

import io
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from callbacks.pictures import GREY, as_pixels, picture

ClipFormat = Literal["webp", "gif"]
MOST_FRAMES = 16
"""Of a strip; longer clips are thinned evenly."""


def clip(decoded: Tensor, columns: int, max_width: int | None = None) -> Tensor:
    """A grid of videos playing together: uint8 frames ``(F, 3, H, W)``.

    Args:
        decoded: videos ``(B, C, F, H, W)``, in [-1, 1] or from :func:`as_pixels`.
        columns: videos a row.
        max_width: of the grid, in pixels; larger ones are made smaller.
    """
    videos = as_pixels(decoded, columns, max_width)
    frames = [make_grid(frame, columns, padding=1, pad_value=GREY) for frame in videos.unbind(2)]
    return torch.stack(frames)


def strip(decoded: Tensor, columns: int, max_width: int | None = None) -> Tensor:
    """The videos of a grid's first row as a still: one row a video, its frames side by side.

    Args:
        decoded: videos ``(B, C, F, H, W)``, in [-1, 1] or from :func:`as_pixels`.
        columns: videos shown.
        max_width: of the picture, in pixels; larger ones are made smaller.

    Returns:
        A uint8 image ``(3, H, W)``.
    """
    count = min(decoded.shape[2], MOST_FRAMES)
    shown = torch.linspace(0, decoded.shape[2] - 1, count).round().long()
    frames = decoded[:columns, :, shown.to(decoded.device)].transpose(1, 2).flatten(0, 1)
    if frames.dtype == torch.uint8:
        frames = frames.float() / 127.5 - 1
    return picture(frames, count, max_width=max_width)


def encode(frames: Tensor, fps: float, kind: ClipFormat) -> bytes:
    """An endlessly repeated animation.

    Args:
        frames: uint8 ``(F, 3, H, W)``.
        fps: frames a second; GIF rounds a frame's time to hundredths of a second.
        kind: the file format; WebP has all colours and is smaller.
    """
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    options = {"quality": 85, "method": 3} if kind == "webp" else {"optimize": False}
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        kind.upper(),
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
    return buffer.getvalue()
