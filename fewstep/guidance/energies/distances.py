"""Distances between what a network makes of a sample and what is wanted of it.

Segmentation maps, sketches and landmarks are maps; identities of faces are embeddings (FreeDoM,
Yu et al. 2023; Shen et al. 2024).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, apart, needed, safe_norm, settled
from fewstep.networks.frames.geometry import area_resized


class NetworkDistance(Energy):
    """A distance of a network's outputs; the target is an output ``(N, ...)`` for each sample."""

    @abstractmethod
    def output(self, x0: Tensor) -> Tensor:
        """What is compared, ``(N, ...)``."""

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Targets of pictures that are as samples should be, once for a whole run."""
        return self.output(pixels)


@dataclass(frozen=True, eq=False)
class MapDistance(NetworkDistance):
    """Euclidean distance between maps.

    Args:
        network: of pictures in [-1, 1]; a :class:`PictureNetwork` resizes and normalises for it.
    """

    network: nn.Module

    def output(self, x0: Tensor) -> Tensor:
        found: Tensor = settled(self.network, self, x0)(x0)
        return found

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = needed(target, self, "maps, as encode_images(pixels) makes them", x0)
        found = self.output(x0)
        if found.shape != wanted.shape:
            raise FewstepError(
                f"The network makes maps {tuple(found.shape)} and the target is "
                f"{tuple(wanted.shape)}; make it with encode_images(pixels)."
            )
        return safe_norm(found - wanted.to(found))


@dataclass(frozen=True, eq=False)
class EmbeddingDistance(NetworkDistance):
    """Distance between embeddings of a part of each picture, such as a face's identity.

    For ArcFace as FreeDoM uses it on pictures of 256 pixels: ``rows=(35, 223)``,
    ``columns=(32, 220)``, ``side=112`` and ``form="l2"``.

    Args:
        network: gives embeddings ``(N, D)`` of pictures in [-1, 1].
        rows, columns: of pixels that it sees, from the first to before the last; all by default.
        side: height and width of what it sees, by averages over areas; None leaves it as it is.
        form: ``l2`` is the distance of unnormalised embeddings, ``cosine`` 1 minus the cosine.
    """

    network: nn.Module
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    side: int | None = None
    form: Literal["l2", "cosine"] = "l2"

    def output(self, x0: Tensor) -> Tensor:
        height, width = x0.shape[-2:]
        (top, bottom), (left, right) = self.rows or (0, height), self.columns or (0, width)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise FewstepError(
                f"EmbeddingDistance looks at rows {top} to {bottom} and columns {left} to {right}, "
                f"and the pictures are {height} x {width}."
            )
        part = x0[..., top:bottom, left:right]
        if self.side is not None:
            part = area_resized(part, self.side)
        found: Tensor = settled(self.network, self, x0)(part)
        return found.flatten(1)

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = needed(target, self, "embeddings, as encode_images(pixels) makes them", x0)
        return apart(self.output(x0), wanted, self.form)
