from __future__ import annotations

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.networks.patches import from_patches, patch_grid, to_patches


@pytest.mark.parametrize("patch_frames", [1, 2])
def test_cutting_into_patches_loses_nothing(patch_frames: int) -> None:
    clip = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    patch = (patch_frames, 4, 4)
    grid = patch_grid((4, 8, 8), patch)
    patches = to_patches(clip, grid, patch)
    assert patches.shape == (3, 4 // patch_frames * 4, 2 * patch_frames * 16)
    assert torch.equal(from_patches(patches, grid, patch), clip)
    # Frame by frame, row by row: a discriminator folds tokens into maps in this order.
    first = clip[:, :, :patch_frames, :4, 4:].flatten(1)
    assert torch.equal(patches[:, 1], first)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FewstepError, match="4 frames of 8 pixels do not divide into patches"):
        patch_grid((4, 8, 8), (3, 4, 4))
