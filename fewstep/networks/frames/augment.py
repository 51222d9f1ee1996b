"""Differentiable augmentation of what a discriminator sees (Zhao et al., DiffAugment, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.colours import recoloured
from fewstep.errors import FewstepError, nearest
from fewstep.networks.frames.geometry import taken, whole_number

NUM_UNIFORMS = 7  # brightness, saturation, contrast, two of the translation, two of the cut-out
TRANSLATION = 0.125  # of a side, at most
CUTOUT = 0.2  # of a side


def diff_augment(
    images: Tensor, uniforms: Tensor, policy: Sequence[str] = ("color", "translation", "cutout")
) -> Tensor:
    """Changes each image in its own way, by its own numbers and by nothing else.

    So results do not depend on the rest of a batch, nor on how a batch is split.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1]; what colours make of them may lie outside.
        uniforms: ``(N, NUM_UNIFORMS)`` in [0, 1), on the images' device.
        policy: what to do, in this order.

    Returns:
        images of the same shape, in float32 at least.
    """
    images = images if images.dtype == torch.float64 else images.float()
    for name in policy:
        images = _OPERATIONS[name](images, uniforms)
    return images


def _color(images: Tensor, uniforms: Tensor) -> Tensor:
    """Brightness by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    return recoloured(images, 2 * uniforms[:, :3] - 1)


def _translation(images: Tensor, uniforms: Tensor) -> Tensor:
    """Moves by up to an eighth of the sides; what is uncovered is zero, a medium grey."""
    index, inside = [], []
    for axis, length in enumerate(images.shape[2:]):
        furthest = round(TRANSLATION * length)
        step = whole_number(uniforms[:, 3 + axis : 4 + axis], 2 * furthest + 1) - furthest
        source = torch.arange(length, device=images.device) - step
        index.append(source % length)
        inside.append((source >= 0) & (source < length))
    rows, columns = inside
    kept = rows[:, None, :, None] & columns[:, None, None, :]
    return taken(images, *index) * kept


def _cutout(images: Tensor, uniforms: Tensor) -> Tensor:
    """Zeroes a box of a fifth of the sides whose centre is anywhere, so that part may stick out."""
    covered = []
    for axis, length in enumerate(images.shape[2:]):
        box = round(CUTOUT * length)
        centre = whole_number(uniforms[:, 5 + axis : 6 + axis], length + 1 - box % 2)
        place = torch.arange(length, device=images.device) - (centre - box // 2)
        covered.append((place >= 0) & (place < box))
    rows, columns = covered
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}


@dataclass(frozen=True)
class DiffAugment:
    """Which augmentations there are; see :func:`diff_augment`.

    Attributes:
        policy: of ``color``, ``translation`` and ``cutout``, in the order in which they are done;
            none of them leaves images as they are.

    Raises:
        FewstepError: for another name.
    """

    policy: tuple[str, ...] = ("color", "translation", "cutout")

    def __post_init__(self) -> None:
        for name in self.policy:
            if name not in _OPERATIONS:
                raise FewstepError(
                    f"There is no augmentation '{name}'.{nearest(name, _OPERATIONS)} "
                    f"There are {', '.join(_OPERATIONS)}."
                )

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Augments ``(N, C, H, W)`` by ``uniforms (N, NUM_UNIFORMS)``."""
        return diff_augment(images, uniforms, self.policy)
