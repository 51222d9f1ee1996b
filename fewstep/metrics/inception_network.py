"""The Inception v3 of TensorFlow's 2015-12-05 graph, built of torch-fidelity's blocks.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016), as
changed for FID by Heusel et al. (NeurIPS 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

SIDE = 299  # of the images it takes
SPATIAL_CHANNELS = 7


class InceptionNetwork(nn.Module):
    """Takes ``(N, 3, 299, 299)`` in [0, 255]; its layers are called as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(2048)
        self.AvgPool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled features, logits without their bias, and the features of sFID.

        The last are the first seven channels of ``mixed_6/conv`` in ADM's evaluation (Dhariwal &
        Nichol 2021). That graph counts the mixed layers from 0 and without their sizes, so that is
        the 1x1 branch of Mixed_6d here, which comes first in the block's output: it costs nothing.

        Returns:
            ``features`` ``(N, 2048)``, ``logits_unbiased`` ``(N, 1008)`` and ``spatial``
            ``(N, 7 * 17 * 17)``.
        """
        x = (images - 128) / 128
        for name, layer in self.named_children():
            if name == "fc":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].contiguous().flatten(1)
        pooled = x.flatten(1)
        logits = pooled @ self.fc.weight.T
        return {"features": pooled, "logits_unbiased": logits, "spatial": spatial}


def tensorflow_bilinear(images: Tensor, side: int = SIDE) -> Tensor:
    """``(N, C, H, W)`` resized as TensorFlow 1 did: corners fixed, nothing averaged.

    Output pixel ``i`` lies at ``i * old / new`` of the input, between the pixels below and above.
    Lines are made wide before they are mixed, which gives the same bits as mixing four pixels
    at each place of the output and takes fewer operations.
    """
    wide = _mixed(images.float(), 3, side)
    return _mixed(wide, 2, side)


def _mixed(images: Tensor, dim: int, side: int) -> Tensor:
    """Linear interpolation along one dimension."""
    size = images.shape[dim]
    scale = torch.tensor(size / side, dtype=torch.float32, device=images.device)
    place = torch.arange(side, dtype=torch.float32, device=images.device) * scale
    low = place.long()
    high = (low + 1).clamp_max(size - 1)
    share = (place - low).view(-1, *[1] * (images.ndim - 1 - dim))
    first, second = images.index_select(dim, low), images.index_select(dim, high)
    return second.sub_(first).mul_(share).add_(first)


def clean_bicubic(images: Tensor, side: int = SIDE) -> Tensor:
    """``(N, C, H, W)`` resized as in Parmar et al., "On Aliased Resizing" (CVPR 2022).

    Antialiased bicubic interpolation of each channel, which float64 does to the last bit of what
    Pillow gives of float images; values that overshoot are cut to [0, 255], nothing is rounded.
    """
    size = (side, side)
    wide = F.interpolate(images.double(), size, mode="bicubic", antialias=True)
    return wide.clamp(0, 255).float()
