"""Networks that look at whole clips, and the control that shows whether they see motion."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Features, Samples, Statistics
from fewstep.metrics.frames import centre_square, colours, cut_clip, shuffle_frames
from fewstep.metrics.frechet import FrechetDistance, GaussianStatistics
from fewstep.metrics.ranks import Ranks

SHUFFLED = "shuffled"


class ClipNetwork(Features):
    """Features ``(B, D)`` of the first frames of each clip.

    Args:
        stride: of the frames that the network sees.
        resolution: side of a square to crop and resize to first; None leaves pixels as they are.
        batch_size: clips at once.
        clip_length: frames that the network sees.
    """

    def __init__(
        self, stride: int, resolution: int | None, batch_size: int, clip_length: int = 16
    ) -> None:
        if clip_length < 1 or stride < 1:
            raise FewstepError("'clip_length' and 'stride' are at least 1.")
        self.clip_length = clip_length
        self.stride = stride
        self.resolution = resolution
        self.shuffled = False
        self.batch_size = batch_size
        self.network: Any = None

    @abstractmethod
    def embed(self, clips: Tensor) -> Tensor:
        """``(B, D)`` of 8-bit clips ``(B, 3, F, H, W)``."""

    def with_shuffled(self) -> Self:
        """The same network with a second output, ``shuffled``.

        It is of the same frames in an order drawn from each sample's number.
        """
        other = copy.copy(self)
        other.shuffled = True
        return other

    def cut(self) -> Hashable:
        """The options that decide what the network is shown."""
        return (self.clip_length, self.stride, self.resolution, self.shuffled)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        assert self.network is not None, "load() comes first"
        clips = cut_clip(colours(samples.pixels), self.clip_length, self.stride)
        if self.resolution is not None:
            clips = centre_square(clips, self.resolution)
        with full_float32(clips.device):
            found = {"features": self._in_parts(clips)}
            if self.shuffled:
                found[SHUFFLED] = self._in_parts(shuffle_frames(clips, samples.numbers))
        return found

    def _in_parts(self, clips: Tensor) -> Tensor:
        return torch.cat([self.embed(part) for part in clips.split(self.batch_size)])

    def clip_protocol(self) -> dict[str, Any]:
        """How clips are cut and resized, in plain values."""
        return {
            "pixels": "8-bit",
            "clip_length": self.clip_length,
            "stride": self.stride,
            "frames": "the first",
            "centre_square": self.resolution,
        }


class ShuffledStatistics(Statistics):
    """Gaussians of clips, and of the same clips with their frames shuffled."""

    def __init__(self) -> None:
        self.plain = GaussianStatistics("features")
        self.shuffled = GaussianStatistics(SHUFFLED)

    def identity(self) -> Hashable:
        return type(self)

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        self.plain.update(features, samples)
        self.shuffled.update(features, samples)

    def merged(self, ranks: Ranks) -> Self:
        found = type(self)()
        found.plain, found.shuffled = self.plain.merged(ranks), self.shuffled.merged(ranks)
        return found

    def tensors(self) -> dict[str, Tensor]:
        plain, shuffled = self.plain.tensors(), self.shuffled.tensors()
        return plain | {f"{SHUFFLED}.{name}": tensor for name, tensor in shuffled.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.plain.restore(tensors)
        self.shuffled.restore({n: tensors[f"{SHUFFLED}.{n}"] for n in self.plain.tensors()})


class ClipFrechetDistance(FrechetDistance):
    """Frechet distance over a network for clips.

    With ``shuffle_frames`` it is a control of the distance itself. ``NAME_shuffled`` compares the
    generated clips, their frames shuffled, with the reference as it is: where it is hardly larger
    than ``NAME``, the distance measures frames and not motion. ``NAME_shuffled_data`` is what
    shuffling costs the reference itself. The network looks at every clip twice, once shuffled.

    Args:
        features: the network; it says which frames it sees.
        name: of the value.
        shuffle_frames: whether this is the control.
    """

    def __init__(self, features: ClipNetwork, name: str, shuffle_frames: bool = False) -> None:
        seen = features.with_shuffled() if shuffle_frames else features
        super().__init__(seen, name=f"{name}_{SHUFFLED}" if shuffle_frames else name)
        self.shuffle_frames = shuffle_frames
        if shuffle_frames:
            self.better = {self.name: "lower", f"{self.name}_data": "higher"}

    def statistics(self) -> Any:
        return ShuffledStatistics() if self.shuffle_frames else super().statistics()

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        if not self.shuffle_frames:
            return super().compute(generated, reference)
        assert isinstance(generated, ShuffledStatistics)
        assert isinstance(reference, ShuffledStatistics)
        (control,) = super().compute(generated.shuffled, reference.plain).values()
        (data,) = super().compute(reference.shuffled, reference.plain).values()
        return {self.name: control, f"{self.name}_data": data}
