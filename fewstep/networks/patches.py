"""Samples as rows of patches, and back."""

from __future__ import annotations

from torch import Tensor

from fewstep.errors import FewstepError

Grid = tuple[int, int, int]


def patch_grid(size: Grid, patch: Grid) -> Grid:
    """How many patches there are in time, height and width.

    Args:
        size: frames, height and width of a clip; an image has one frame.
        patch: those of a patch.

    Raises:
        FewstepError: if the clip does not divide into patches.
    """
    if any(whole % part for whole, part in zip(size, patch, strict=True)):
        raise FewstepError(
            f"Clips of {size[0]} frames of {size[1]} pixels do not divide into patches of "
            f"{patch[0]} frames of {patch[1]} pixels."
        )
    frames, rows, columns = (whole // part for whole, part in zip(size, patch, strict=True))
    return frames, rows, columns


def to_patches(clip: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """``(B, C, F, H, W)`` to ``(B, N, values)``, frame by frame and row by row."""
    (frames, rows, columns), (deep, high, wide) = grid, patch
    cut = clip.unflatten(4, (columns, wide)).unflatten(3, (rows, high)).unflatten(2, (frames, deep))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(patches: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """The inverse of :func:`to_patches`."""
    cut = patches.unflatten(2, (-1, *patch)).unflatten(1, grid)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
