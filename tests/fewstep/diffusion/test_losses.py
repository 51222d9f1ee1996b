from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.losses import (
    approximated_gradient_penalty,
    distance,
    hinge_discriminator,
    hinge_generator,
    mse,
    non_saturating_discriminator,
    non_saturating_generator,
    one_centred_penalty,
    pseudo_huber,
    relativistic_discriminator,
    relativistic_generator,
)

LN2 = math.log(2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(seed: int) -> list[Tensor]:
    """Logits of two heads of different map sizes."""
    return [randn(4, 1, 2, 2, seed=seed), randn(4, 1, 3, 5, seed=seed + 10)]


ZERO = [torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 3, 5)]
PAIRED: list[Callable[[list[Tensor], list[Tensor]], Tensor]] = [
    hinge_discriminator,
    non_saturating_discriminator,
    relativistic_discriminator,
    relativistic_generator,
    approximated_gradient_penalty,
]


def test_pseudo_huber_has_its_closed_values() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(pseudo_huber(zero, zero, c=0.3)) == 0
    # A 3-4-5 triangle, and the mean over elements.
    assert float(pseudo_huber(zero + 4, zero, c=3.0)) == pytest.approx(2)
    assert float(pseudo_huber(torch.tensor([4.0, 0.0]), zero, c=3.0)) == pytest.approx(1)


def test_pseudo_huber_is_quadratic_near_and_absolute_far() -> None:
    zero, c = torch.zeros(1, dtype=torch.float64), 1e-3
    near, far = zero + 1e-6, zero + 10
    assert float(pseudo_huber(near, zero, c)) == pytest.approx(1e-12 / (2 * c), rel=1e-5)
    assert float(pseudo_huber(far, zero, c)) == pytest.approx(10 - c, rel=1e-6)
    assert float(pseudo_huber(far, zero)) == pytest.approx(10 - 1e-3, rel=1e-7)


def test_pseudo_huber_has_bounded_gradient() -> None:
    x = torch.tensor([-100.0, -1e-4, 0.0, 1e-4, 100.0], requires_grad=True)
    pseudo_huber(x, torch.zeros(5)).backward()
    assert x.grad is not None
    assert x.grad[2] == 0
    assert (5 * x.grad).abs().max() <= 1
    assert float(5 * x.grad[4]) == pytest.approx(1)


def test_distances_are_found_by_the_name_in_a_config() -> None:
    x, y = randn(3, 4), randn(3, 4, seed=1)
    assert distance("l2")(x, y) == mse(x, y)
    assert float(mse(x, y)) == pytest.approx(float((x - y).square().mean()))
    assert distance("huber", 0.5)(x, y) == pseudo_huber(x, y, 0.5)
    assert distance("huber")(x, y) == pseudo_huber(x, y, 1e-3)


def test_losses_of_an_undecided_discriminator_are_at_chance() -> None:
    assert hinge_discriminator(ZERO, ZERO) == 2
    assert hinge_generator(ZERO) == 1
    assert float(non_saturating_discriminator(ZERO, ZERO)) == pytest.approx(2 * LN2)
    assert float(non_saturating_generator(ZERO)) == pytest.approx(LN2)
    assert float(relativistic_discriminator(ZERO, ZERO)) == pytest.approx(LN2)
    assert float(relativistic_generator(ZERO, ZERO)) == pytest.approx(LN2)


def test_no_discriminator_beats_two_when_fake_is_real() -> None:
    scores = torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = torch.stack([hinge_discriminator([x], [x]) for x in scores])
    assert float(losses.min()) == pytest.approx(2, abs=1e-12)
    assert losses[(scores.abs() <= 1)].max() < 2 + 1e-12
    assert losses[scores.abs() > 1.005].min() > 2.001


def test_a_perfect_discriminator_loses_nothing() -> None:
    real, fake = [torch.full((4, 1), 30.0)], [torch.full((4, 1), -30.0)]
    for loss in (
        hinge_discriminator,
        non_saturating_discriminator,
        relativistic_discriminator,
    ):
        assert float(loss(real, fake)) == pytest.approx(0, abs=1e-6)
        assert float(loss(fake, real)) > 30  # and a mistaken one loses much
    assert float(hinge_generator(fake)) == 31
    assert float(hinge_generator(real)) == 0
    assert float(non_saturating_generator(fake)) == pytest.approx(30)
    assert float(relativistic_generator(real, fake)) == pytest.approx(60)


def test_gan_losses_have_their_formulas() -> None:
    real, fake = heads(0), heads(1)

    def expected(term: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float(sum(term(r, f).mean() for r, f in zip(real, fake, strict=True)) / 2)

    assert float(hinge_discriminator(real, fake)) == pytest.approx(
        expected(lambda r, f: (1 - r).clamp_min(0) + (1 + f).clamp_min(0))
    )
    assert float(hinge_generator(fake)) == pytest.approx(
        expected(lambda r, f: (1 - f).clamp_min(0))
    )
    assert float(non_saturating_discriminator(real, fake)) == pytest.approx(
        expected(lambda r, f: -r.sigmoid().log() - (1 - f.sigmoid()).log())
    )
    assert float(non_saturating_generator(fake)) == pytest.approx(
        expected(lambda r, f: -f.sigmoid().log())
    )
    assert float(relativistic_discriminator(real, fake)) == pytest.approx(
        expected(lambda r, f: -(r - f).sigmoid().log())
    )


def test_heads_weigh_alike_whatever_their_map_sizes() -> None:
    fake = [torch.full((1, 1, 1, 1), -1.0), torch.full((1, 1, 64, 64), 1.0)]
    assert hinge_generator(fake) == 1


def test_the_relativistic_game_is_antisymmetric_and_sees_differences_only() -> None:
    real, fake = heads(0), heads(1)
    assert relativistic_generator(real, fake) == relativistic_discriminator(fake, real)
    raised = [[x + 5 for x in side] for side in (real, fake)]
    torch.testing.assert_close(
        relativistic_discriminator(*raised), relativistic_discriminator(real, fake)
    )
    # softplus(x) - softplus(-x) = x, averaged over heads.
    gap = torch.stack([(r - f).mean() for r, f in zip(real, fake, strict=True)]).mean()
    difference = relativistic_generator(real, fake) - relativistic_discriminator(real, fake)
    torch.testing.assert_close(difference, gap)


def test_the_approximated_penalty_is_the_gradient_norm() -> None:
    count, dim, sigma = 200_000, 3, 0.01
    noise, x = randn(count, dim), randn(count, dim, seed=1)
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def linear(x: Tensor) -> Tensor:
        return x @ slope

    def smooth(x: Tensor) -> Tensor:
        return x.sin().sum(1)

    expected = {linear: slope.square().sum(), smooth: x.cos().square().sum(1).mean()}
    for score, norm in expected.items():
        penalty = approximated_gradient_penalty([score(x)], [score(x + sigma * noise)])
        assert float(penalty) / sigma**2 == pytest.approx(float(norm), rel=0.02)


@pytest.mark.parametrize("loss", PAIRED)
def test_gradient_reaches_both_arguments(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> None:
    first, second = ([x.requires_grad_() for x in heads(seed)] for seed in (0, 1))
    loss(first, second).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in first + second)


@pytest.mark.parametrize(
    ("loss", "direction"), [(hinge_generator, -1), (non_saturating_generator, -1)]
)
def test_generators_climb_the_score(loss: Callable[[list[Tensor]], Tensor], direction: int) -> None:
    fake = torch.zeros(4, 1, requires_grad=True)
    loss([fake]).backward()
    assert fake.grad is not None
    assert (fake.grad * direction > 0).all()


@pytest.mark.parametrize("loss", PAIRED)
def test_half_precision_logits_are_computed_in_float32(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> None:
    first, second = ([x.bfloat16() for x in heads(seed)] for seed in (0, 1))
    value = loss(first, second)
    assert value.dtype == torch.float32
    exact = loss([x.double() for x in first], [x.double() for x in second])
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [pseudo_huber, mse])
def test_half_precision_differences_are_computed_in_float32(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    x, y = randn(64).bfloat16(), randn(64, seed=1).bfloat16()
    assert loss(x, y).dtype == torch.float32
    assert loss(x.double(), y.double()).dtype == torch.float64
    torch.testing.assert_close(loss(x, y).double(), loss(x.double(), y.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", PAIRED)
def test_a_missing_head_is_an_error(loss: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        loss(heads(0), heads(1)[:1])


def test_mcms_wgan_loss_is_the_hinge_loss_less_two() -> None:
    real, fake = ([2 * x for x in heads(seed)] for seed in (0, 1))
    released = torch.stack(
        [
            (-r).clamp_min(-1).mean() + f.clamp_min(-1).mean()
            for r, f in zip(real, fake, strict=True)
        ]
    ).mean()
    hinge = float(hinge_discriminator(real, fake))
    assert hinge - float(released) == pytest.approx(2, abs=1e-14)


def test_the_one_centred_penalty_of_a_linear_score_is_closed() -> None:
    slopes = [randn(3, 4), randn(5, 2, seed=1)]
    features = [randn(6, *a.shape, seed=2).requires_grad_() for a in slopes]
    logits = [(a * f).sum(2) for a, f in zip(slopes, features, strict=True)]
    norm = torch.cat([a.flatten() for a in slopes]).norm()  # joint over levels
    expected = float((norm - 1) ** 2)
    assert float(one_centred_penalty(features, logits)) == pytest.approx(expected)
    assert float(one_centred_penalty(features, [torch.cat(logits, 1)])) == pytest.approx(expected)


def test_the_one_centred_penalty_is_a_mean_over_samples() -> None:
    features = [randn(4, 7).requires_grad_()]
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    direction = torch.nn.functional.normalize(randn(7, seed=1), dim=0)
    penalty = one_centred_penalty(features, [scale * (features[0] @ direction)])
    assert float(penalty) == pytest.approx(float((scale - 1).square().mean()))


def test_the_one_centred_penalty_has_the_gradient_of_its_formula() -> None:
    slope = randn(7).requires_grad_()
    features = [randn(3, 7, seed=1).requires_grad_()]
    one_centred_penalty(features, [features[0] @ slope]).backward()
    norm = slope.detach().norm()
    assert slope.grad is not None
    torch.testing.assert_close(slope.grad, 2 * (norm - 1) * slope.detach() / norm)


def test_a_flat_score_has_a_penalty_of_one_and_no_gradient_that_is_not_a_number() -> None:
    slope = torch.zeros(7, requires_grad=True)
    features = [randn(3, 7).float().requires_grad_(), randn(3, 7).float().requires_grad_()]
    penalty = one_centred_penalty(features, [f @ slope for f in features])
    penalty.backward()
    assert penalty == 1
    assert slope.grad is not None
    assert torch.equal(slope.grad, torch.zeros(7))
