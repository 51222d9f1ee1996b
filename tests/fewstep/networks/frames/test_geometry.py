from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewstep.networks.frames.geometry import area_resized, crop, whole_number


@pytest.mark.parametrize(("height", "width"), [(30, 30), (31, 45), (20, 20), (7, 64)])
def test_the_area_resize_is_torchs(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(images, (20, 20), mode="area")
    found = area_resized(images, 20)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * x).sum(), images)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_autocast_leaves_pixels_their_precision() -> None:
    images = torch.rand(2, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = area_resized(images, 28)
    assert torch.equal(found, area_resized(images, 28))


def test_an_image_of_that_size_stays_as_it_is() -> None:
    images = torch.rand(2, 3, 20, 20)
    assert area_resized(images, 20) is images


def test_whole_numbers_are_equally_likely_and_never_too_large() -> None:
    uniforms = torch.arange(0, 1, 1 / 70)
    assert whole_number(uniforms, 7).bincount().tolist() == [10] * 7
    assert whole_number(torch.tensor([1 - 2**-24]).bfloat16(), 7) == 6


def test_windows_are_where_their_numbers_say() -> None:
    images = torch.rand(3, 2, 10, 12)
    uniforms = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.25]])
    found = crop(images, 8, uniforms)
    assert torch.equal(found[0], images[0, :, :8, :8])
    assert torch.equal(found[1], images[1, :, 2:, 4:])
    assert torch.equal(found[2], images[2, :, 1:9, 1:9])


def test_gradient_reaches_the_pixels_in_the_window_and_no_others() -> None:
    images = torch.rand(1, 1, 6, 6, requires_grad=True)
    crop(images, 4, torch.tensor([[0.4, 0.9]])).sum().backward()
    expected = torch.zeros(1, 1, 6, 6)
    expected[..., 1:5, 2:6] = 1
    assert images.grad is not None
    assert torch.equal(images.grad, expected)
