from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from fewstep.errors import FewstepError
from fewstep.metrics.frames import (
    Preparation,
    centre_square,
    colours,
    cut_clip,
    each_frame,
    resized,
    shuffle_frames,
)

from metric_cases import noise


def test_colours_are_eight_bits_and_three() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2)
    found = colours(pixels)
    assert found.dtype == torch.uint8
    assert found.shape == (1, 3, 2, 2)
    assert found[0, 2].flatten().tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_each_frame_is_seen_alone_and_found_in_its_place(batch_size: int) -> None:
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.mean((2, 3))

    videos = noise(3, 3, 5, 4, 6)
    found = each_frame(videos, network, batch_size)
    torch.testing.assert_close(found, videos.mean((3, 4)).transpose(1, 2))
    assert max(seen) <= batch_size
    torch.testing.assert_close(
        each_frame(videos[:, :, 0], network, batch_size), videos[:, :, 0].mean((2, 3))
    )


def test_clips_are_the_first_frames_at_a_stride() -> None:
    video = torch.arange(20).view(1, 1, 20, 1, 1)
    assert cut_clip(video, 4, 1).flatten().tolist() == [0, 1, 2, 3]
    assert cut_clip(video, 4, 5).flatten().tolist() == [0, 5, 10, 15]
    assert cut_clip(video[:, :, :16], 4, 5).flatten().tolist() == [0, 5, 10, 15]
    with pytest.raises(FewstepError, match="15 frames; 4 at a stride of 5 take 16"):
        cut_clip(video[:, :, :15], 4, 5)
    with pytest.raises(FewstepError, match="the samples are images"):
        cut_clip(video[0], 4, 1)


def test_the_order_of_shuffled_frames_is_a_samples_own() -> None:
    video = torch.arange(16).view(1, 1, 16, 1, 1).expand(3, -1, -1, -1, -1)
    found = shuffle_frames(video, torch.tensor([7, 2**62, 9])).flatten(1)
    assert all(sorted(row.tolist()) == list(range(16)) for row in found)
    assert not torch.equal(found[0], found[1])
    again = shuffle_frames(video[:2], torch.tensor([9, 7])).flatten(1)
    assert torch.equal(again, found[[2, 0]])


def test_the_centre_is_what_stays_of_an_oblong() -> None:
    pixels = torch.zeros(1, 3, 2, 8, 16, dtype=torch.uint8)
    pixels[..., 4:12] = 200
    assert torch.equal(centre_square(pixels, 4), torch.full((1, 3, 2, 4, 4), 200).byte())


def test_pixels_of_the_right_size_are_left_alone() -> None:
    pixels = (noise(2, 3, 8, 8) * 100).byte()
    assert resized(pixels, [8, 8], InterpolationMode.BICUBIC) is pixels


def config(folder: Path, **options: object) -> Path:
    plain = {"size": 8, "crop_size": 6, "resample": 2, "image_mean": [0.5] * 3}
    content = {**plain, "image_std": [0.25] * 3, **options}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def test_old_and_new_ways_of_writing_sizes_mean_the_same(tmp_path: Path) -> None:
    old = Preparation.read(config(tmp_path))
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 6, "width": 6}}
    assert Preparation.read(config(tmp_path, **sizes)) == old
    grey = torch.full((2, 3, 20, 10), 255, dtype=torch.uint8)
    assert torch.equal(old(grey), torch.full((2, 3, 6, 6), 2.0))  # (1 - 0.5) / 0.25
    whole = Preparation.read(config(tmp_path, do_center_crop=False))
    assert whole(grey).shape == (2, 3, 16, 8)
    fixed = Preparation.read(config(tmp_path, size={"height": 5, "width": 7}, crop_size=None))
    assert fixed(grey).shape == (2, 3, 5, 7)


@pytest.mark.parametrize(
    "options", [{"do_resize": False}, {"size": None}, {"resample": 77}, {"image_mean": None}]
)
def test_a_preparation_that_cannot_be_followed_is_an_error(
    tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(FewstepError, match="preprocessor_config"):
        Preparation.read(config(tmp_path, **options))
