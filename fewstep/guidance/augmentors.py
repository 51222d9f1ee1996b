"""Random views of clean samples: a gradient that many views share is less adversarial.

An augmentor is a plain function of samples and of uniform random numbers, which are drawn
elsewhere for each sample alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.colours import recoloured
from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Target


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
    def __call__(self, x: Tensor, target: Target, uniform: Tensor) -> tuple[Tensor, Target]:
        """Views and what is wanted of them.

        Args:
            x: samples ``(N, ...)``.
            target: what is wanted of each, ``(N, ...)``; for a sum of energies a mapping.
            uniform: numbers in (0, 1), ``(N, numbers)``.
        """


@dataclass(frozen=True)
class Identity(Augmentor):
    """No augmentation."""

    def __call__(self, x: Tensor, target: Target, uniform: Tensor) -> tuple[Tensor, Target]:
        return x, target


PLAIN = Identity()
"""Each sample as it is."""


@dataclass(frozen=True)
class DiffAugment(Augmentor):
    """Random colour, shift, zoom and cutout (Zhao et al. 2020; Shen et al. 2024, section 4).

    Pictures ``(N, C, H, W)`` in [-1, 1], or videos ``(N, C, F, H, W)``, of which all frames get the
    same. In this order: brightness, saturation, contrast; a shift by whole pixels and a zoom about
    the centre, with zeros outside; a square set to mid-grey. Unlike the released code each view has
    a zoom of its own.

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

    def __call__(self, x: Tensor, target: Target, uniform: Tensor) -> tuple[Tensor, Target]:
        if x.ndim not in (4, 5):
            raise FewstepError(
                f"DiffAugment is for pictures (B, C, H, W) and videos (B, C, F, H, W), not for "
                f"shape {tuple(x.shape)}. Use Identity or Gaussian smoothing."
            )
        if self.joint and target is not None:
            if not isinstance(target, Tensor):
                raise FewstepError(
                    "DiffAugment with joint: true moves one target, and a Sum has several; "
                    "set joint: false."
                )
            if target.ndim not in (4, x.ndim):
                raise FewstepError(
                    "DiffAugment with joint: true moves a target as it moves the sample, so it has "
                    f"to be a picture (B, C, H, W) or as it is, not {tuple(target.shape)}. "
                    "Set joint: false for labels, embeddings and the like."
                )
            target = _by_frame(self._warp, target, 2 * uniform - 1)
        return _by_frame(self._view, x, uniform), target

    def _view(self, x: Tensor, uniform: Tensor) -> Tensor:
        spread = 2 * uniform - 1
        x = recoloured(x, spread[:, :3], self.brightness, self.saturation, self.contrast)
        x = self._warp(x, spread)
        return torch.where(self._hole(x, uniform), 0.0, x) if self.cutout else x

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


def _by_frame(change: Callable[[Tensor, Tensor], Tensor], x: Tensor, numbers: Tensor) -> Tensor:
    """Changes pictures ``(N, C, H, W)``, or all frames of videos alike, by numbers ``(N, n)``."""
    if x.ndim == 4:
        return change(x, numbers)
    count = x.shape[2]
    frames = change(x.transpose(1, 2).flatten(0, 1), numbers.repeat_interleave(count, dim=0))
    return frames.unflatten(0, (len(x), count)).transpose(1, 2)
