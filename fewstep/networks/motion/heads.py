"""Learnable heads: residual maps that start as the identity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.motion.base import MotionRepresentation, frame_differences


class LearnableHead(MotionRepresentation):
    """``M(z) = z + g(z)``, frame by frame, with a light ``g``; MCM trained all its students so.

    ``g`` is SiLU, 1x1 convolution, group norm, SiLU, 1x1 convolution; 708 parameters for four
    channels. Its last convolution starts at zero, and so the first update is that of
    :class:`RawMotion`. It has nothing over time: it relaxes what each frame must match.

    Args:
        width: channels within ``g``.
    """

    trainable = True

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise FewstepError(f"{type(self).__name__} needs a width of at least 1, not {width}.")
        self.width = width

    def build(self, channels: int, frames: int, height: int, width: int) -> None:
        last = nn.Conv2d(self.width, channels, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.residual = nn.Sequential(nn.SiLU(), *self.hidden(channels), last)

    def hidden(self, channels: int) -> list[nn.Module]:
        """The layers of ``g`` between its first SiLU and its last convolution."""
        return _block(channels, self.width, kernel_size=1)

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)``; float32 unless both head and video are of half precision."""
        frames = video.transpose(1, 2).flatten(0, 1)
        # Two branches that are almost alike are compared: bfloat16 would round the difference away.
        with torch.autocast(video.device.type, enabled=False):
            change = self.residual(frames.to(next(self.parameters()).dtype))
        return video + change.unflatten(0, (len(video), -1)).transpose(1, 2)


class HeavyLearnableHead(LearnableHead):
    """:class:`LearnableHead` with 3x3 convolutions, ``layers`` of them; 113,924 parameters.

    Args:
        width: channels within ``g``.
        layers: 3x3 convolutions, each with group norm and SiLU.
    """

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__(width)
        if layers < 1:
            raise FewstepError(f"HeavyLearnableHead needs at least one layer, not {layers}.")
        self.layers = layers

    def hidden(self, channels: int) -> list[nn.Module]:
        inputs = [channels] + [self.width] * (self.layers - 1)
        return [layer for given in inputs for layer in _block(given, self.width, kernel_size=3)]


class LearnableDifference(LearnableHead):
    """A :class:`LearnableHead` on differences of frames, so nothing that stands still counts."""

    invariances = frozenset({"static_image", "channel_constant"})
    least_frames = 2

    def untrained(self, video: Tensor) -> Tensor:
        return frame_differences(video)

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` to ``(B, C, F - 1, H, W)``."""
        return super().forward(frame_differences(video))


def _block(inputs: int, width: int, kernel_size: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, width, kernel_size, padding=kernel_size // 2)
    return [convolution, nn.GroupNorm(math.gcd(32, width), width), nn.SiLU()]
