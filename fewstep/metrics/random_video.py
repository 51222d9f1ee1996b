"""Random features of clips: a Frechet distance that needs no weights, and is no FVD.

What a convolutional network sees before it is trained still tells blur, marks and disordered frames
from the data's look and motion, on data that pretrained networks do not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.metrics.clip_networks import ClipNetwork
from fewstep.seeding import torch_generator

CHANNELS = (3, 16, 32, 32)


class RandomPyramid(nn.Module):
    """Three 3-D convolutions that are never trained, each halving height and width.

    Args:
        seed: of the weights, drawn on the CPU.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch_generator(seed, "random-video-features")
        self.kernels = nn.ParameterList()
        for inward, outward in pairwise(CHANNELS):
            kernel = torch.randn(outward, inward, 3, 3, 3, generator=generator)
            self.kernels.append(kernel * (2 / kernel[0].numel()) ** 0.5)

    def forward(self, clips: Tensor) -> Tensor:
        """Mean and deviation of each channel of each level, ``(B, 160)``.

        Args:
            clips: ``(B, 3, F, H, W)`` in [-1, 1].
        """
        found = []
        for level, kernel in enumerate(self.kernels):
            # Time is left as it is at first, where it tells the order of neighbouring frames.
            stride = (2 if level else 1, 2, 2)
            clips = F.leaky_relu(F.conv3d(clips, kernel, stride=stride, padding=1), 0.2)
            found += [clips.mean((2, 3, 4)), clips.std((2, 3, 4), correction=0)]
        return torch.cat(found, 1)


class RandomVideoFeatures(ClipNetwork):
    """Features ``(B, 160)`` of an untrained 3-D convolutional network, fixed by its seed.

    With :class:`~fewstep.metrics.FrechetDistance` it gives ``frechet_random_video``. Its figures
    can be compared with one another at one seed, resolution and clip length, and with nothing else.

    Args:
        clip_length: frames that the network sees, the first ones.
        stride: of those frames.
        resolution: side of a square to crop and resize clips to first; None leaves them.
        seed: of the weights.
        batch_size: clips at once.
    """

    name = "random_video"

    def __init__(
        self,
        clip_length: int = 16,
        stride: int = 1,
        resolution: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        super().__init__(stride, resolution, batch_size, clip_length)
        self.seed = seed

    def prepare(self) -> None:
        """Nothing is needed on disk."""

    def load(self, device: torch.device) -> None:
        """Draws the network."""
        network = RandomPyramid(self.seed)
        weights = b"".join(kernel.detach().numpy().tobytes() for kernel in network.kernels)
        self.sha256 = hashlib.sha256(weights).hexdigest()[:16]
        self.network = network.requires_grad_(False).eval().to(device)

    def identity(self) -> Hashable:
        return (type(self), self.seed, self.cut())

    def embed(self, clips: Tensor) -> Tensor:
        return self.network(clips.float() / 127.5 - 1)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": "random, never trained",
            "seed": self.seed,
            "weights_sha256": self.sha256,
            **self.clip_protocol(),
        }
