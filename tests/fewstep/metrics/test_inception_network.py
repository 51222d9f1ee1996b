from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from fewstep.metrics.inception_network import (
    InceptionNetwork,
    clean_bicubic,
    tensorflow_bilinear,
)

SIZES = [(1, 1), (32, 32), (48, 70), (299, 299), (300, 310), (512, 256)]


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def by_pillow(picture: Tensor) -> Tensor:
    """clean-fid's resize as its paper says: each channel a float picture."""
    channels = [
        Image.fromarray(c.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        for c in picture
    ]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]).clip(0, 255))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_usual_resize_gives_the_bits_that_torch_fidelitys_gives(
    height: int, width: int
) -> None:
    images = pictures(height, width)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    assert torch.equal(tensorflow_bilinear(images), theirs)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_clean_resize_is_pillows_of_single_float_channels(height: int, width: int) -> None:
    images = pictures(height, width)
    found = clean_bicubic(images)
    assert found.dtype == torch.float32
    expected = torch.stack([by_pillow(image) for image in images])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_clean_resize_averages_what_the_usual_one_leaves_out() -> None:
    images = pictures(600, 600)
    assert float(clean_bicubic(images).std()) < 0.8 * float(tensorflow_bilinear(images).std())


def test_spatial_features_are_the_first_of_the_blocks_single_convolution(
    inception_weights: Path,
) -> None:
    network = InceptionNetwork().eval()
    network.load_state_dict(torch.load(inception_weights, weights_only=True))
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        found = network(tensorflow_bilinear(pictures(32, 32, 1)))
    assert {name: values.shape for name, values in found.items()} == {
        "features": (1, 2048),
        "logits_unbiased": (1, 1008),
        "spatial": (1, 7 * 17 * 17),
    }
    assert torch.equal(found["spatial"], seen[0][:, :7].flatten(1))
    assert float(found["spatial"].std()) > 0
