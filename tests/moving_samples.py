"""Clips of moving digits as samples, and what is known about them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.moving_clips import Clip, Kind, Scene, moving_clip


def digit_clips(
    kind: Kind, count: int = 40, start: int = 0, **options: int
) -> tuple[Tensor, list[Clip]]:
    """Pixels ``(B, 1, F, H, W)`` in [-1, 1] of clips with these numbers, and the clips."""
    scene = Scene(**options)  # type: ignore[arg-type]
    clips = [moving_clip(n, 0, kind, scene=scene) for n in range(start, start + count)]
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    return frames[:, None].float() / 127.5 - 1, clips
