"""Random views of clean samples: a gradient that many views share is less adversarial.

An augmentor is a plain function of samples and of uniform random numbers, which are drawn
elsewhere for each sample alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.colours import recoloured
from fewstep.errors import FewstepError


class Augmentor(ABC):
    """Makes views of samples."""

    @property
    def copies(self) -> int:
        """Views of each sample."""
        return 1

    @property
    def numbers(self) -> int:
        """Random numbers one view needs."""
        return 0

    @abstractmethod
    def __call__(
        self, x: Tensor, target: Tensor | None, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Views and what is wanted of them.

        Args:
            x: samples ``(N, ...)``.
            target: what is wanted of each, ``(N, ...)``.
            uniform: numbers in (0, 1), ``(N, numbers)``.
        """


@dataclass(frozen=True)
class Identity(Augmentor):
    """No augmentation."""

    def __call__(
        self, x: Tensor, target: Tensor | None, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return x, target


PLAIN = Identity()
"""Each sample as it is."""


@dataclass(frozen=True)
class DiffAugment(Augmentor):
    """Random colour, shift, zoom and cutout (Zhao et al. 2020; Shen et al. 2024, section 4).

    Pictures ``(N, C, H, W)`` in [-1, 1]. In this order: brightness, saturation, contrast; a shift
    by whole pixels and a zoom about the centre, with zeros outside; a square set to mid-grey.
    Unlike the released code each view has a zoom of its own.

    Args:
        copies: views of each sample. The paper says 10, its released code uses 20.
        brightness: adds up to this much.
        saturation: scales the distance from the mean over channels by 1 plus or minus this.
        contrast: scales the distance from the picture's mean by 1 plus or minus this.
        translation: shifts by up to this share of each side.
        zoom: scales by 1 plus or minus this.
        cutout: side of the square as a share of the picture's; 0 is off.
        joint: shifts and zooms the target as well, for targets that are pictures themselves. Only
            without cutout: nothing is known of what a network makes of a grey square.
    """

    copies: int = 10
    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    translation: float = 0.125
    zoom: float = 0.2
    cutout: float = 0.5
    joint: bool = False

    @property
    def numbers(self) -> int:
        return 8

    def __post_init__(self) -> None:
        if self.copies < 1 or self.zoom >= 1:
            raise FewstepError("DiffAugment needs copies of 1 or more and a zoom below 1.")
        if self.joint and self.cutout:
            raise FewstepError("DiffAugment with joint: true cannot cut out; set cutout: 0.")

    def __call__(
        self, x: Tensor, target: Tensor | None, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if x.ndim != 4:
            raise FewstepError(
                f"DiffAugment is for pictures (B, C, H, W), not for shape {tuple(x.shape)}. "
                "Use Identity or Gaussian smoothing."
            )
        spread = 2 * uniform - 1
        x = recoloured(x, spread[:, :3], self.brightness, self.saturation, self.contrast)
        x = self._warp(x, spread)
        if self.cutout:
            x = torch.where(self._hole(x, uniform), 0.0, x)
        if self.joint and target is not None:
            target = self._warp(target, spread)
        return x, target

    def _warp(self, x: Tensor, spread: Tensor) -> Tensor:
        """Shift, then zoom. The grid's coordinates run from -1 to 1 over a side."""
        if not (self.translation or self.zoom):
            return x
        theta = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
        for axis, side in enumerate((x.shape[-1], x.shape[-2])):
            pixels = (spread[:, 3 + axis] * self.translation * side).round()
            theta[:, axis, axis] = 1 / (1 + self.zoom * spread[:, 5])
            theta[:, axis, 2] = -2 * pixels / side
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)

    def _hole(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Where the square is, ``(N, 1, H, W)``."""
        inside = []
        for side, number in ((x.shape[-2], uniform[:, 6]), (x.shape[-1], uniform[:, 7])):
            size = int(side * self.cutout + 0.5)
            first = (number * (side + 1)).floor() - size // 2
            place = torch.arange(side, device=x.device)
            inside.append((place >= first[:, None]) & (place < first[:, None] + size))
        return (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)
