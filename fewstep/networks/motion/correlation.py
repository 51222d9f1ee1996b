"""How alike places of consecutive frames are, before any softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.motion.base import MotionRepresentation


class LocalCorrelation(MotionRepresentation):
    """Dot products ``z[f](p) . z[f + 1](p + offset) / sqrt(C)`` over a window of offsets.

    Places outside the image have no entries: a mean over what is returned is one over real pairs.
    (MCM's code has -1e9 there, a fifth of all entries of 32 x 32 latents.)

    Args:
        radius: of the window, ``(2 radius + 1)^2`` offsets.
    """

    least_frames = 2

    def __init__(self, radius: int = 7) -> None:
        super().__init__()
        if radius < 0:
            raise FewstepError(f"LocalCorrelation needs a radius of at least 0, not {radius}.")
        self.radius = radius

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` to ``(B, F - 1, N)``, ``N`` pairs of a place and an offset.

        Offsets are in rows, top first; those of one offset are its places in rows.
        """
        height, width = video.shape[-2:]
        scaled = video * video.shape[1] ** -0.5
        before, after = scaled[:, :, :-1], video[:, :, 1:]
        # A product for each offset takes views of the frames; one for all would copy them so often.
        found = []
        for down in self._shifts(height):
            for right in self._shifts(width):
                here = before[..., _inside(down, height), _inside(right, width)]
                there = after[..., _inside(-down, height), _inside(-right, width)]
                found.append((here * there).sum(1).flatten(2))
        return torch.cat(found, dim=2)

    def _shifts(self, size: int) -> range:
        reach = min(self.radius, size - 1)
        return range(-reach, reach + 1)


def _inside(shift: int, size: int) -> slice:
    """The places ``p`` of a side for which ``p + shift`` is on it too."""
    return slice(max(0, -shift), size - max(0, shift))


class GlobalCorrelation(MotionRepresentation):
    """Dot products ``z[f](p) . z[f + 1](q) / sqrt(C)`` of all pairs of places.

    What it returns takes memory: 4 GB in float32 for four clips of 16 frames of 64 x 64 latents,
    and the backward pass as much again.

    Args:
        height_scaled: multiplies with ``sqrt(H)``, so that taller videos weigh more.
    """

    least_frames = 2

    def __init__(self, height_scaled: bool = False) -> None:
        super().__init__()
        self.height_scaled = height_scaled

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` to ``(B, F - 1, H W, H W)``, the earlier frame's places first."""
        channels, height = video.shape[1], video.shape[-2]
        scale = (height if self.height_scaled else 1) ** 0.5 * channels**-0.5
        places = video.flatten(3).transpose(1, 2)  # (B, F, C, H W)
        before = (places[:, :-1] * scale).transpose(2, 3)  # the small side, not the large product
        # Autocast would round to half precision what a loss is to find small differences in.
        with torch.autocast(video.device.type, enabled=False):
            return before @ places[:, 1:]
