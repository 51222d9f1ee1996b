"""GAN losses where logits are sure of themselves: nothing overflows, and no gradient is lost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.losses import (
    non_saturating_discriminator,
    non_saturating_generator,
    relativistic_discriminator,
    relativistic_generator,
)

Paired = Callable[[list[Tensor], list[Tensor]], Tensor]
PAIRED: list[Paired] = [
    non_saturating_discriminator,
    relativistic_discriminator,
    relativistic_generator,
]


def softplus(x: float) -> float:
    """In Python's double precision."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(x - softplus(x))


def leaf(value: float) -> Tensor:
    return torch.tensor([value], requires_grad=True)


@pytest.mark.parametrize("real", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("fake", [-40.0, 0.0, 40.0])
def test_losses_of_sure_logits_and_their_gradients_are_those_of_double_precision(
    real: float, fake: float
) -> None:
    expected = {
        non_saturating_discriminator: (
            softplus(-real) + softplus(fake),
            -sigmoid(-real),
            sigmoid(fake),
        ),
        relativistic_discriminator: (
            softplus(fake - real),
            -sigmoid(fake - real),
            sigmoid(fake - real),
        ),
        relativistic_generator: (
            softplus(real - fake),
            sigmoid(real - fake),
            -sigmoid(real - fake),
        ),
    }
    for loss, wanted in expected.items():
        logits = leaf(real), leaf(fake)
        value = loss([logits[0]], [logits[1]])
        found = [value.detach(), *torch.autograd.grad(value, logits)]
        assert [float(x) for x in found] == pytest.approx(wanted, rel=1e-5, abs=0)


def test_a_generators_gradient_is_how_sure_the_discriminator_is_of_a_fake() -> None:
    """``-sigmoid(-D)`` a sample, which is -1 and does not vanish where it is quite sure."""
    logits = torch.linspace(-40, 40, 81, requires_grad=True)
    loss = non_saturating_generator([logits])
    (found,) = torch.autograd.grad(81 * loss, logits)
    wanted = torch.tensor([-sigmoid(-x) for x in logits.tolist()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert found[:10].tolist() == pytest.approx([-1] * 10)
    value = sum(softplus(-x) for x in logits.tolist()) / 81
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("loss", PAIRED)
def test_only_relativistic_losses_ignore_what_is_added_to_all_logits(loss: Paired) -> None:
    made = torch.Generator().manual_seed(0)
    real, fake = 3 * torch.randn(2, 64, generator=made, dtype=torch.float64)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss([real + offset], [fake + offset]), offset)
    change = float(loss([real + 7], [fake + 7]) - loss([real], [fake]))
    relativistic = loss is not non_saturating_discriminator
    assert (abs(float(slope)) < 1e-12) == relativistic
    assert (abs(change) < 1e-12) == relativistic
