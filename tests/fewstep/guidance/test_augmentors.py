from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import DDIM, DiffAugment, Energy, Identity, Objective, Smoothing, plan_steps

STEP = plan_steps(VPSchedule(), VPSchedule().spaced_times(4), DDIM())[2]
OFF = {
    "brightness": 0.0,
    "saturation": 0.0,
    "contrast": 0.0,
    "translation": 0.0,
    "zoom": 0.0,
    "cutout": 0.0,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def alone(**options: float) -> DiffAugment:
    return DiffAugment(**{**OFF, **options})  # type: ignore[arg-type]


def numbers(count: int = 2, **columns: float) -> Tensor:
    """Numbers that leave everything in the middle of its range, but for some columns."""
    uniform = torch.full((count, 8), 0.5).double()
    names = ["brightness", "saturation", "contrast", "right", "down", "zoom", "top", "left"]
    for name, value in columns.items():
        uniform[:, names.index(name)] = value
    return uniform


X = randn(2, 3, 16, 16)


def test_in_the_middle_of_all_ranges_nothing_changes() -> None:
    out, target = DiffAugment(cutout=0.0)(X, X, numbers())
    torch.testing.assert_close(out, X)
    assert target is X


def test_colours_change_as_they_are_described() -> None:
    brighter, _ = alone(brightness=0.5)(X, None, numbers(brightness=1.0))
    torch.testing.assert_close(brighter, X + 0.5)
    grey, _ = alone(saturation=1.0)(X, None, numbers(saturation=0.0))
    torch.testing.assert_close(grey, X.mean(1, keepdim=True).expand_as(X))
    flat, _ = alone(contrast=0.5)(X, None, numbers(contrast=0.0))
    mean = X.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, mean + (X - mean) / 2)


def test_shifts_are_by_whole_pixels_with_zeros_beyond_the_edge() -> None:
    moved, _ = alone(translation=0.125)(X, None, numbers(right=1.0, down=0.0))
    expected = torch.zeros_like(X)
    expected[..., :-2, 2:] = X[..., 2:, :-2]
    torch.testing.assert_close(moved, expected)


def test_a_zoom_is_about_the_centre() -> None:
    ramp = torch.linspace(-1, 1, 17).double().expand(1, 1, 17, 17)
    larger, _ = alone(zoom=0.25)(ramp, None, numbers(1, zoom=1.0))
    torch.testing.assert_close(larger, ramp / 1.25)
    smaller, _ = alone(zoom=0.5)(ramp, None, numbers(1, zoom=0.0))
    assert not smaller[..., 0].any()  # zeros outside
    torch.testing.assert_close(smaller[..., 8, 5:12], 2 * ramp[..., 8, 5:12])


def test_a_square_of_half_the_side_is_cut_out() -> None:
    cut, _ = alone(cutout=0.5)(X, None, numbers())
    hole = (cut == 0).all(1)
    assert hole.sum((1, 2)).tolist() == [64, 64]
    assert bool(hole[:, 4:12, 4:12].all())
    corner, _ = alone(cutout=0.5)(X, None, numbers(top=0.001, left=0.999))
    assert (corner == 0).all(1).sum((1, 2)).tolist() == [16, 16]
    assert not corner[..., :4, -4:].any()


def test_a_joint_target_moves_with_its_picture_and_keeps_its_colours() -> None:
    uniform = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).double()
    augment = DiffAugment(cutout=0.0, joint=True)
    _, target = augment(X, X, uniform)
    moved, _ = alone(translation=augment.translation, zoom=augment.zoom)(X, None, uniform)
    assert target is not None
    torch.testing.assert_close(target, moved)
    assert (target - X).abs().max() > 0.1
    with pytest.raises(FewstepError, match="cutout: 0"):
        DiffAugment(joint=True)
    with pytest.raises(FewstepError, match="joint: false for labels"):
        augment(X, torch.zeros(2).long(), uniform)
    _, shared = augment(X[:, :, None].expand(-1, -1, 3, -1, -1), X, uniform)  # by all frames
    torch.testing.assert_close(shared, target)


class Angle(Energy):
    """One minus the cosine with the target."""

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return 1 - torch.cosine_similarity(x0.flatten(1), target.flatten(1))


def gradient(augmentor: DiffAugment | Identity, smoothing: Smoothing, seed: int = 3) -> Tensor:
    leaf = X.clone().requires_grad_()
    draws = [torch.Generator().manual_seed(seed + row) for row in range(2)]
    losses = Objective(Angle(), augmentor, smoothing).drawn(
        leaf, randn(2, 3, 16, 16, seed=1), STEP, draws
    )
    loss = losses(leaf)
    assert loss.shape == (2,)
    return torch.autograd.grad(loss.sum(), leaf)[0]


def test_the_gradient_over_views_is_the_mean_of_the_gradients_of_single_views() -> None:
    together = gradient(DiffAugment(copies=4), Smoothing())
    leaf, aim, single = X.clone().requires_grad_(), randn(2, 3, 16, 16, seed=1), []
    draws = [torch.Generator().manual_seed(3 + row) for row in range(2)]
    uniform = torch.special.ndtr(
        torch.stack([torch.randn(4, 8, generator=g, dtype=torch.float64) for g in draws])
    )
    for view in range(4):
        seen, _ = DiffAugment()(leaf, aim, uniform[:, view])
        single.append(torch.autograd.grad(Angle()(seen, aim).sum(), leaf)[0])
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=0, atol=1e-12)


def test_one_view_of_no_augmentation_is_no_augmentation() -> None:
    leaf = X.clone().requires_grad_()
    loss = Angle()(leaf, randn(2, 3, 16, 16, seed=1))
    plain = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(gradient(Identity(), Smoothing()), plain, rtol=0, atol=1e-12)


def test_more_views_agree_better_with_one_another() -> None:
    agreement = []
    for copies in (1, 4, 16):
        one, other = (gradient(DiffAugment(copies), Smoothing(), s).flatten() for s in (3, 40))
        agreement.append(float(torch.cosine_similarity(one, other, dim=0)))
    assert agreement[0] < agreement[1] < agreement[2]


class Rippled(Energy):
    """A smooth loss with a ripple that a picture cannot show."""

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        flat = x0.flatten(1)
        return flat.square().sum(1) / 2 + 0.3 * torch.sin(60 * flat).sum(1)


def test_noisy_copies_recover_the_gradient_that_a_ripple_hides() -> None:
    leaf, cosines = X.clone().requires_grad_(), []
    for copies in (1, 8, 64):
        draws = torch.Generator().manual_seed(1)
        smoothing = Smoothing(0.1, copies, relative=False, reduction="mean")
        loss = Objective(Rippled(), smoothing=smoothing).drawn(leaf, None, STEP, draws)(leaf)
        found = torch.autograd.grad(loss.sum(), leaf)[0]
        cosines.append(float(torch.cosine_similarity(found.flatten(), X.flatten(), dim=0)))
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[0] < 0.3
    assert cosines[2] > 0.4


def test_samples_that_are_not_pictures_are_refused() -> None:
    with pytest.raises(FewstepError, match="Use Identity"):
        DiffAugment()(torch.zeros(2, 4), None, torch.zeros(2, 8))
    with pytest.raises(FewstepError, match="zoom below 1"):
        DiffAugment(zoom=1.0)
