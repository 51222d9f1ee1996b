from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.errors import FewstepError
from fewstep.networks.frames import NUM_UNIFORMS, DiffAugment, diff_augment

BRIGHTNESS, SATURATION, CONTRAST = range(3)
DOWN, ACROSS = 3, 4  # translation
ROW, COLUMN = 5, 6  # cut-out


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def numbers(count: int) -> Tensor:
    return torch.rand(count, NUM_UNIFORMS, generator=torch.Generator().manual_seed(1))


def neutral(**changes: float) -> Tensor:
    """Numbers that leave colours and places as they are, but for some."""
    uniforms = torch.full((1, NUM_UNIFORMS), 0.5)
    for name, value in changes.items():
        uniforms[0, globals()[name]] = value
    return uniforms


def test_an_image_is_changed_alike_whatever_the_batch_is() -> None:
    images, uniforms = pictures(5, 3, 16, 24), numbers(5)
    whole = diff_augment(images, uniforms)
    for image, row, expected in zip(images, uniforms, whole, strict=True):
        assert torch.equal(diff_augment(image[None], row[None])[0], expected)
    assert not torch.equal(whole[0], diff_augment(images[:1], uniforms[1:2])[0])


def test_middling_numbers_leave_colours_and_places_as_they_are() -> None:
    images = pictures(1, 3, 16, 16)
    found = diff_augment(images, neutral(), ["color", "translation"])
    torch.testing.assert_close(found, images)


def test_colours_change_as_far_as_said() -> None:
    images = pictures(1, 3, 8, 8)
    grey, mean = images.mean(1, keepdim=True), images.mean()
    expected = {
        ("BRIGHTNESS", 0.0): images - 0.5,
        ("BRIGHTNESS", 0.75): images + 0.25,
        ("SATURATION", 0.0): grey.expand_as(images),
        ("SATURATION", 0.75): grey + 1.5 * (images - grey),
        ("CONTRAST", 0.0): mean + 0.5 * (images - mean),
        ("CONTRAST", 0.75): mean + 1.25 * (images - mean),
    }
    for (name, value), picture in expected.items():
        found = diff_augment(images, neutral(**{name: value}), ["color"])
        torch.testing.assert_close(found, picture)


def test_grey_images_have_no_saturation() -> None:
    images = pictures(1, 1, 8, 8)
    found = [diff_augment(images, neutral(SATURATION=u), ["color"]) for u in (0.0, 0.9)]
    torch.testing.assert_close(found[0], images)
    assert torch.equal(*found)


def test_images_move_by_up_to_an_eighth_and_leave_grey_behind() -> None:
    images = pictures(1, 3, 16, 32)
    found = diff_augment(images, neutral(DOWN=0.0, ACROSS=0.999), ["translation"])
    assert torch.equal(found[..., :14, 4:], images[..., 2:, :28])
    assert (found[..., 14:, :] == 0).all()
    assert (found[..., :4] == 0).all()


def test_all_moves_are_equally_likely() -> None:
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8, 8] = 1
    uniforms = torch.full((50, NUM_UNIFORMS), 0.5)
    uniforms[:, DOWN] = torch.arange(50) / 50
    found = diff_augment(image.expand(50, -1, -1, -1), uniforms, ["translation"])
    assert found[:, 0, :, 8].sum(0).tolist() == [0] * 6 + [10] * 5 + [0] * 5


def test_a_fifth_of_the_sides_is_cut_out() -> None:
    images = torch.ones(1, 3, 20, 30)
    found = diff_augment(images, neutral(ROW=0.5, COLUMN=0.5), ["cutout"])
    assert (found[..., 8:12, 12:18] == 0).all()
    assert float(found.sum()) == 3 * (20 * 30 - 4 * 6)


def test_the_box_may_stick_out_on_all_sides_alike() -> None:
    images = torch.ones(400, 1, 20, 20)
    uniforms = torch.full((400, NUM_UNIFORMS), 0.5)
    uniforms[:, ROW] = torch.arange(400) / 400
    covered = 1 - diff_augment(images, uniforms, ["cutout"])[:, 0, :, 10]
    assert covered.sum(1).min() == 2  # half of it, at the top and at the bottom
    torch.testing.assert_close(covered.sum(0), covered.sum(0).flip(0), atol=20, rtol=0)


def test_gradient_is_that_of_what_was_done() -> None:
    images = pictures(2, 3, 6, 6).double().requires_grad_()
    uniforms = numbers(2).double()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, uniforms), images)


def test_half_precision_images_are_changed_in_float32() -> None:
    images, uniforms = pictures(2, 3, 8, 8).bfloat16(), numbers(2)
    found = diff_augment(images, uniforms)
    assert found.dtype == torch.float32
    assert torch.equal(found, diff_augment(images.float(), uniforms))


def test_nothing_asks_for_a_value() -> None:
    with FakeTensorMode():
        found = diff_augment(torch.rand(2, 3, 8, 8), torch.rand(2, NUM_UNIFORMS))
    assert found.shape == (2, 3, 8, 8)


def test_a_policy_chooses_what_is_done() -> None:
    images, uniforms = pictures(3, 3, 16, 16), numbers(3)
    assert torch.equal(DiffAugment()(images, uniforms), diff_augment(images, uniforms))
    assert torch.equal(DiffAugment(())(images, uniforms), images)
    moved = DiffAugment(("translation",))(images, uniforms)
    assert torch.equal(moved, diff_augment(images, uniforms, ["translation"]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffAugment().policy = ()  # type: ignore[misc]


def test_an_unknown_augmentation_is_answered_with_the_nearest() -> None:
    with pytest.raises(FewstepError, match=r"'colour'.*Did you mean 'color'\?.*cutout"):
        DiffAugment(("colour",))
