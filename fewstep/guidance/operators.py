"""Linear operators with an exact adjoint: what a measurement sees of a picture.

Pictures are ``(B, C, H, W)``, films ``(B, C, F, H, W)``; operators act on the last two dimensions
of each. :class:`Matrix` acts on vectors ``(B, D)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import FewstepError


class LinearOperator(ABC):
    """A linear map of samples; ``<A x, y> = <x, A* y>``."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``A x``."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A* y``, shaped like samples."""


@dataclass(frozen=True, eq=False)
class Matrix(LinearOperator):
    """A matrix ``(M, D)`` for vectors ``(B, D)``."""

    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y)


class _Masking(LinearOperator):
    """Sets hidden pixels to 0, the middle grey of [-1, 1]; its own adjoint."""

    @abstractmethod
    def keep(self, x: Tensor) -> Tensor:
        """Which pixels are seen, ``(H, W)`` bool on the sample's device."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.keep(x), x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)


@dataclass(frozen=True)
class HiddenBox(_Masking):
    """Hides a box of pixels (inpainting)."""

    top: int
    left: int
    height: int
    width: int

    def keep(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[-2], device=x.device)[:, None]
        column = torch.arange(x.shape[-1], device=x.device)
        rows = (row >= self.top) & (row < self.top + self.height)
        return ~(rows & (column >= self.left) & (column < self.left + self.width))


@dataclass(frozen=True)
class HiddenPixels(_Masking):
    """Hides a random share of the pixels, the same for all samples.

    Args:
        share: how many, between 0 and 1.
        seed: decides which.
    """

    share: float
    seed: int = 0

    def keep(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.rand(x.shape[-2:], generator=generator) >= self.share).to(x.device)


@dataclass(frozen=True)
class Blur(LinearOperator):
    """A Gaussian blur.

    Args:
        std: in pixels.
        size: side of the kernel, odd. TFG's deblurring has ``std=3, size=61``.
        padding: what is outside the picture: itself, mirrored at its outermost pixels (``reflect``,
            as in TFG), or 0, which is the middle grey of pixels in [-1, 1] (``zeros``).
    """

    std: float
    size: int
    padding: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        if self.size % 2 == 0:
            raise FewstepError(f"A blur's kernel has an odd side; change size from {self.size}.")
        if self.padding not in ("reflect", "zeros"):
            raise FewstepError(f"A blur's padding is reflect or zeros, not '{self.padding}'.")

    def _matrix(self, length: int, x: Tensor) -> Tensor:
        """The blur along one side, ``(length, length)``.

        Raises:
            FewstepError: if half the kernel is no smaller than the side that is mirrored.
        """
        reach = torch.arange(self.size, device=x.device) - self.size // 2
        kernel = torch.exp(-0.5 * (reach.to(x.dtype) / self.std).square())
        seen = torch.arange(length, device=x.device)[:, None] + reach
        inside = (seen >= 0) & (seen < length)
        weights = (kernel / kernel.sum()).expand(length, -1)
        if self.padding == "zeros":
            weights = torch.where(inside, weights, 0.0)
        elif self.size // 2 >= length:
            raise FewstepError(
                f"A blur of {self.size} pixels cannot mirror a side of {length}: take a smaller "
                "size, or padding: zeros."
            )
        seen = (length - 1) - ((length - 1) - seen.abs()).abs()
        return x.new_zeros(length, length).scatter_add_(1, seen.clamp(0, length - 1), weights)

    def __call__(self, x: Tensor) -> Tensor:
        return self._matrix(x.shape[-2], x) @ x @ self._matrix(x.shape[-1], x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self._matrix(y.shape[-2], y).T @ y @ self._matrix(y.shape[-1], y)


@dataclass(frozen=True)
class Downsample(LinearOperator):
    """Means over squares of ``factor`` by ``factor`` pixels (super-resolution)."""

    factor: int

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise FewstepError(
                f"A picture of {x.shape[-2]} x {x.shape[-1]} cannot be divided into squares of "
                f"{self.factor}; choose a factor that divides both."
            )
        small = F.avg_pool2d(x.flatten(0, -4) if x.ndim > 4 else x, self.factor)
        return small.reshape(*x.shape[:-2], *small.shape[-2:])

    def adjoint(self, y: Tensor) -> Tensor:
        wide = y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return wide / self.factor**2
