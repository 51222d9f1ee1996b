"""How much moves: differences of successive frames, and the length of optical flow.

A model of few steps can freeze its videos and still have good frames. Neither amount is good by
itself: noise flickers, so read them against the data's. Flow magnitude: Wang et al., "Phased
Consistency Models" (NeurIPS 2024), table 4, by RAFT (Teed & Deng, ECCV 2020).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from fewstep.errors import FewstepError
from fewstep.metrics.amounts import Amount
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Features, Samples, to_uint8
from fewstep.metrics.frames import colours, resized
from fewstep.metrics.weights import WeightFile, file_sha256, fill, read_state

URL = "https://download.pytorch.org/models/"
NETWORKS = {
    "large": WeightFile(
        "raft_large_C_T_SKHT_V2-ff5fadd5.pth",
        f"{URL}raft_large_C_T_SKHT_V2-ff5fadd5.pth",
        "ff5fadd5",
    ),
    "small": WeightFile(
        "raft_small_C_T_V2-01064c6d.pth", f"{URL}raft_small_C_T_V2-01064c6d.pth", "01064c6d"
    ),
}
SMALLEST = 128  # pixels: RAFT compares frames at an eighth of their size, then three times halved
MULTIPLE = 8


def _check_video(pixels: Tensor) -> None:
    if pixels.ndim != 5 or pixels.shape[2] < 2:
        raise FewstepError(
            "Motion is measured on videos of at least two frames; the samples are "
            f"{tuple(pixels.shape)}."
        )


class Motion(Amount):
    """The mean amount of motion of a set, and how it compares with the reference's."""

    nothing = "The reference videos do not move at all"


class MotionDifference(Motion):
    """``motion_difference``: mean absolute difference of successive frames' 8-bit values.

    In shares of the range from black to white: 1 is a blink of everything.
    """

    def __init__(self) -> None:
        super().__init__("motion_difference")

    def amounts(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        _check_video(samples.pixels)
        found = []
        for video in samples.pixels:  # one at a time: the differences are as large as the batch
            frames = to_uint8(video).float()
            found.append(frames.diff(dim=1).abs().mean() / 255)
        return [torch.stack(found)]


class RAFTFeatures(Features):
    """torchvision's RAFT: the mean length of the flow between successive frames, ``flow``.

    In pixels of the resized frames: amounts of different resolutions differ unless ``resolution``
    makes them one. Frames are padded by their own edges to multiples of 8 and at least 128 pixels.

    Args:
        size: of the network; published figures take ``large``.
        weights: path of the state dict; PyTorch's cache by default.
        resolution: shorter side to resize frames to; None leaves them as they are.
        updates: of the flow.
        batch_size: pairs of frames at once.
    """

    name = "raft"

    def __init__(
        self,
        size: Literal["large", "small"] = "large",
        weights: str | None = None,
        resolution: int | None = None,
        updates: int = 12,
        batch_size: int = 8,
    ) -> None:
        self.size = size
        self.weights = weights
        self.resolution = resolution
        self.updates = updates
        self.batch_size = batch_size
        self.network: Any = None

    def prepare(self) -> None:
        NETWORKS[self.size].locate(self.weights)

    def load(self, device: torch.device) -> None:
        """Loads the network.

        Raises:
            FewstepError: if the weights are missing, damaged or of another network.
        """
        path = NETWORKS[self.size].locate(self.weights)
        with torch.random.fork_rng(devices=[]):
            network = torchvision.models.get_model(f"raft_{self.size}", weights=None)
        fill(network, read_state(path), path)
        self.network = network.requires_grad_(False).eval().to(device)
        self.sha256 = file_sha256(path)[:16]

    def identity(self) -> Hashable:
        return (type(self), self.size, self.weights, self.resolution, self.updates)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        _check_video(samples.pixels)
        with full_float32(samples.pixels.device):
            videos = colours(samples.pixels)
            return {"flow": torch.stack([self._flow(video) for video in videos])}

    def _flow(self, video: Tensor) -> Tensor:
        """The mean flow of an 8-bit video ``(3, F, H, W)``, a scalar."""
        frames = video.transpose(0, 1)
        if self.resolution is not None:
            scale = self.resolution / min(frames.shape[-2:])
            size = [round(side * scale) for side in frames.shape[-2:]]
            frames = resized(frames, size, InterpolationMode.BILINEAR)
        height, width = frames.shape[-2:]
        padded = _padded(frames.float() / 127.5 - 1)
        pairs = zip(*(f.split(self.batch_size) for f in (padded[:-1], padded[1:])), strict=True)
        lengths = [self._lengths(a, b)[:, :height, :width] for a, b in pairs]
        return torch.cat(lengths).mean()

    def _lengths(self, first: Tensor, second: Tensor) -> Tensor:
        """``(N, H, W)`` of the last update's flow."""
        return self.network(first, second, num_flow_updates=self.updates)[-1].norm(dim=1)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "weights_sha256": self.sha256,
            "published_weights": self.sha256.startswith(NETWORKS[self.size].sha256),
            "pixels": "8-bit",
            "shorter_side": self.resolution,
            "padding": f"replicated at the end, to multiples of {MULTIPLE} and {SMALLEST}",
            "updates": self.updates,
        }


def _padded(frames: Tensor) -> Tensor:
    """Frames with their last row and column repeated until RAFT takes them."""
    more = [max(-(-side // MULTIPLE) * MULTIPLE, SMALLEST) - side for side in frames.shape[-2:]]
    return F.pad(frames, (0, more[1], 0, more[0]), mode="replicate")


class MotionFlow(Motion):
    """``motion_flow``: mean length of optical flow between successive frames, in pixels.

    Args:
        features: RAFT; the large one by default.
    """

    def __init__(self, features: RAFTFeatures | None = None) -> None:
        super().__init__("motion_flow")
        self.features = features or RAFTFeatures()

    def amounts(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        return [features["flow"]]
