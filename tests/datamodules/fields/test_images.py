"""Images: which bytes are accepted, and what is cut out of them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.fields import Images, image_shape
from datamodules.fields.images import _Cut, nearest_aspect, time_ids

from shard_files import encoded, png


def gradient(height: int, width: int) -> np.ndarray:
    """Red rises from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def draws(seed: int = 0):  # type: ignore[no-untyped-def]
    return lambda: np.random.default_rng(seed)


@pytest.mark.parametrize(("kind", "name"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_formats_are_decoded_to_channels_first(kind: str, name: str) -> None:
    pixels = gradient(16, 24)
    found = Images().decode(encoded(pixels, kind), name, None).value
    assert found.shape == (3, 16, 24)
    assert found.dtype == torch.uint8
    error = np.abs(found.permute(1, 2, 0).numpy().astype(int) - pixels).mean()
    assert error == 0 if kind == "PNG" else error < 6


@pytest.mark.parametrize("kind", ["EPS", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_whatever_they_are_called(kind: str) -> None:
    """An EPS would be handed to an interpreter."""
    with pytest.raises(ValueError, match="it is no PNG, JPEG, WEBP image"):
        Images().decode(encoded(gradient(8, 8), kind), "png", None)


def test_absurd_dimensions_are_refused_before_decoding() -> None:
    data = bytearray(png(0))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises((ValueError, Image.DecompressionBombError), match=r"60000|3600000000"):
        Images().decode(bytes(data), "png", None)
    with pytest.raises(ValueError, match="more than max_pixels: 63"):
        Images(max_pixels=63).decode(png(0), "png", None)


@pytest.mark.parametrize("cut", [20, 40, 50])
def test_truncated_images_are_errors(cut: int) -> None:
    with pytest.raises((OSError, ValueError, SyntaxError)):
        Images().decode(png(7)[:cut], "png", None)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 90), (90, 40), (33, 40)])
def test_evaluation_takes_the_centre_whatever_the_aspect(height: int, width: int) -> None:
    image = Image.fromarray(gradient(height, width))
    found = Images(size=(20, 30), crop="random", flip=True).decode(
        encoded(gradient(height, width)), "png", None
    )
    scale = min(height / 20, width / 30)
    top, left = (height - 20 * scale) / 2, (width - 30 * scale) / 2
    box = (left, top, left + 30 * scale, top + 20 * scale)
    expected = np.asarray(image.resize((30, 20), Image.Resampling.LANCZOS, box=box))
    assert np.array_equal(found.value.permute(1, 2, 0).numpy(), expected)


def test_random_crops_stay_inside_and_cover_at_least_the_given_share() -> None:
    field = Images(size=16, crop="random", min_scale=0.25)
    data = encoded(gradient(64, 128))
    spans, lefts = [], []
    for seed in range(60):
        pixels = field.decode(data, "png", draws(seed)).value.float()
        red, green = pixels[0].mean(0) / 255 * 127, pixels[1].mean(1) / 255 * 63
        spans.append(float(green[-1] - green[0]) / 63)
        lefts.append(float(red[0]))
    assert 0.42 < min(spans) < 0.6  # half a side is a quarter of the area
    assert max(spans) > 0.85
    assert max(lefts) - min(lefts) > 60


def test_half_of_the_images_are_mirrored() -> None:
    field = Images(flip=True)
    data = encoded(gradient(8, 8))
    mirrored = [
        bool(field.decode(data, "png", draws(seed)).value[0, 0, 0] > 128) for seed in range(200)
    ]
    assert 70 < sum(mirrored) < 130


def told_and_seen(flip: bool, seed: int) -> tuple[list[int], torch.Tensor]:
    """What is told of a crop of 20 x 30 from 80 x 240, and the crop."""
    field = Images((20, 30), crop="random", min_scale=0.25, flip=flip, time_ids=True)
    found = field.decode(encoded(gradient(80, 240)), "png", draws(seed))
    return found.cond["time_ids"].tolist(), found.value.float()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_network_is_told_where_its_crop_lies(flip: bool, seed: int) -> None:
    numbers, pixels = told_and_seen(flip, seed)
    assert numbers[:2] == [80, 240]
    assert numbers[4:] == [20, 30]
    red, green = pixels[0].mean(0) / 255 * 239, pixels[1].mean(1) / 255 * 79  # places in the file
    scale = float(green[15] - green[5]) / 10
    mirrored = bool(red[0] > red[-1])
    left = float(239 - red[0] if mirrored else red[0])
    # The centre of the crop's first pixel lies half a resized pixel within the edge.
    assert numbers[2] == pytest.approx((float(green[0]) + 0.5) / scale - 0.5, abs=1.2)
    assert numbers[3] == pytest.approx((left + 0.5) / scale - 0.5, abs=1.2)


def test_both_ways_round_are_told_of() -> None:
    """Mirrored or not, a crop is told of as that of the image it then is part of."""
    seen = {bool(told_and_seen(True, seed)[1][0, 0, 0] > 128) for seed in range(6)}
    assert seen == {False, True}


def test_what_is_told_of_a_known_cut() -> None:
    cut = _Cut(left=30.0, top=8.0, scale=2.0)
    found = time_ids((100, 200), (40, 60), cut)
    assert found.tolist() == [100, 200, 4, 15, 40, 60]
    assert not found.is_floating_point()
    assert time_ids((100, 200), (40, 60), cut, mirrored=True).tolist() == [100, 200, 4, 25, 40, 60]


def test_whole_and_centred_images_are_told_of_as_they_are() -> None:
    centre = Images((20, 30), crop="random", flip=True, time_ids=True)
    data = encoded(gradient(40, 90))
    assert centre.decode(data, "png", None).cond["time_ids"].tolist() == [40, 90, 0, 8, 20, 30]
    whole = Images(time_ids=True).decode(data, "png", None).cond["time_ids"]
    assert whole.tolist() == [40, 90, 0, 0, 40, 90]
    exact = Images((40, 90), crop="random", time_ids=True).decode(data, "png", draws())
    assert exact.cond["time_ids"].tolist() == [40, 90, 0, 0, 40, 90]


def test_nothing_is_told_unless_asked_for_and_pixels_are_the_same() -> None:
    data = encoded(gradient(40, 90))
    options: dict[str, Any] = {"size": 20, "crop": "random", "flip": True}
    plain, told = Images(**options), Images(**options, time_ids=True)
    assert plain.decode(data, "png", draws()).cond == {}
    for seed in range(4):
        assert torch.equal(
            plain.decode(data, "png", draws(seed)).value,
            told.decode(data, "png", draws(seed)).value,
        )
    assert plain.describe() == told.describe()


def test_an_image_can_be_a_video_of_one_frame() -> None:
    assert Images(as_video=True).decode(png(3), "png", None).value.shape == (3, 1, 8, 8)


def test_pixels_are_between_minus_one_and_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8)
    assert Images().finish(ends).tolist() == [-1.0, 1.0]


def test_a_bucket_is_the_nearest_by_ratio() -> None:
    sizes = [(32, 64), (48, 48), (64, 32)]
    shapes = np.array([[100, 210], [100, 140], [100, 145], [140, 100], [300, 100]])
    assert nearest_aspect(shapes, sizes).tolist() == [0, 1, 0, 1, 2]


def test_a_mixed_batch_takes_its_most_frequent_bucket() -> None:
    field = Images(buckets=[(32, 64), (64, 32)])
    fitted = field.for_batch([(10, 30), (30, 10), (10, 20)])
    found = fitted.decode(encoded(gradient(30, 10)), "png", None).value
    assert found.shape == (3, 32, 64)
    assert field.size is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_shape_is_known_from_the_first_bytes(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    asked = []

    def read(limit: int) -> bytes:
        asked.append(limit)
        return data[: min(limit, 64 * 2**10)] if kind != "WEBP" else data

    assert image_shape(kind.lower(), read) == (200, 300)
    assert image_shape("txt", read) is None
    assert len(asked) == 1, "a text was read for its height"
    assert image_shape("png", lambda limit: b"no image") is None
