"""The face of all motion representations, and the two that need nothing built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from fewstep.errors import FewstepError

Invariance = Literal["static_image", "channel_constant"]


class MotionRepresentation(nn.Module):
    """``M``: a video ``(B, C, F, H, W)`` to what is compared, ``(B, ...)``.

    Each sample's representation depends on that sample alone.

    Attributes:
        invariances: what may be added to a video without changing its representation:
            ``static_image``, one image to all frames; ``channel_constant``, one number a channel.
            In these the loss leaves a student free.
        least_frames: frames that a video must have.
        trainable: whether it has parameters to train. The target then takes their average, and the
            loss alone lets them shrink: watch them with :func:`motion_statistics`.
    """

    invariances: ClassVar[frozenset[Invariance]] = frozenset()
    least_frames: ClassVar[int] = 1
    trainable: ClassVar[bool] = False

    def configure(self, sample_shape: Sequence[int]) -> None:
        """Builds what depends on the videos' shape; to be called once, before use.

        Args:
            sample_shape: of one video, ``(C, F, H, W)``.

        Raises:
            FewstepError: if that is no video, or has too few frames.
        """
        name = type(self).__name__
        if len(sample_shape) != 4:
            raise FewstepError(
                f"{name} represents videos (channels, frames, height, width), and the samples here "
                f"have shape {list(sample_shape)}. Give a video teacher."
            )
        channels, frames, height, width = sample_shape
        if frames < self.least_frames:
            raise FewstepError(
                f"{name} compares consecutive frames, so it needs videos of at least "
                f"{self.least_frames}, not {frames}. Give more frames, or another motion "
                "representation, such as fewstep.networks.motion.RawMotion."
            )
        self.build(channels, frames, height, width)

    def build(self, channels: int, frames: int, height: int, width: int) -> None:
        """What a representation builds for its videos; nothing by default."""

    def untrained(self, video: Tensor) -> Tensor:
        """What a trainable representation gives until it is trained; the others, the video."""
        return video


class RawMotion(MotionRepresentation):
    """The video itself: consistency distillation as for images."""

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)``, as given."""
        return video


class FrameDifference(MotionRepresentation):
    """``z[f + 1] - z[f]``: all but what stands still."""

    invariances = frozenset({"static_image", "channel_constant"})
    least_frames = 2

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` to ``(B, C, F - 1, H, W)``."""
        return frame_differences(video)


def frame_differences(video: Tensor) -> Tensor:
    """``z[f + 1] - z[f]`` of a video ``(B, C, F, H, W)``."""
    return video[:, :, 1:] - video[:, :, :-1]
