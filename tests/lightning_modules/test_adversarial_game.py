"""The game's penalties against the squared gradients that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.adversarial_game import AdversarialDraws, AdversarialGame

from post_training import vectors


class Critic(nn.Module):
    """A small discriminator of vectors, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(16, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)]
        self.layers = nn.Sequential(*layers).double()

    def judge(self, samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.layers(x)[:, 0] for x in samples)

    def slopes(self) -> list[nn.Parameter]:
        """All but the last bias, on which no penalty depends."""
        return list(self.layers.parameters())[:-1]


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("sigma", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("relativistic", [False, True])
def test_the_approximated_penalties_are_on_average_the_squared_gradients(
    relativistic: bool, sigma: float
) -> None:
    critic = Critic()
    _, exact = AdversarialGame(relativistic, 1.0, sigma, True).discriminator_loss(
        critic.judge, *vectors(64)
    )
    _, found = AdversarialGame(relativistic, 1.0, sigma, False).discriminator_loss(
        critic.judge, *vectors(64, 400)
    )
    names = ["penalty", "fake_penalty"] if relativistic else ["penalty"]
    assert [name for name in found if "penalty" in name] == names
    for name in names:
        assert float(found[name].detach()) == pytest.approx(float(exact[name].detach()), rel=0.03)


def cosine_with_exact(judge_of: Callable[[Critic], Any]) -> float:
    critic = Critic()
    _, exact = AdversarialGame(False, 1.0, 0.01, True).discriminator_loss(
        critic.judge, *vectors(64)
    )
    wanted = gradient(exact["penalty"], critic.slopes())
    _, logs = AdversarialGame(False, 1.0, 0.01, False).discriminator_loss(
        judge_of(critic), *vectors(64, 64)
    )
    found = gradient(logs["penalty"], critic.slopes())
    return float(torch.cosine_similarity(found, wanted, dim=0))


def test_the_approximated_penalty_trains_as_the_exact_one() -> None:
    assert cosine_with_exact(lambda critic: critic.judge) > 0.99


def test_a_penalty_with_one_branch_detached_would_train_something_else() -> None:
    """So the test above sees whether both branches carry gradient."""

    def half(critic: Critic) -> Any:
        def judge(samples: Sequence[Tensor], positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
            *logits, perturbed = critic.judge(samples, positions)
            return (*logits, perturbed.detach())

        return judge

    assert abs(cosine_with_exact(half)) < 0.5


def test_the_penalty_weighs_as_published() -> None:
    """``lambda |D(x) - D(x + sigma n)|^2``; exactly ``lambda sigma^2 |grad D|^2``."""
    critic, given = Critic(), vectors(8)
    real, _, draws = given
    clean, moved = critic.judge([real, real + 0.1 * draws.real_perturbation], [])
    for exact in (False, True):
        loss, logs = AdversarialGame(False, 50.0, 0.1, exact).discriminator_loss(
            critic.judge, *given
        )
        penalty = loss - logs["discriminator"]
        wanted = 50 * (clean - moved).square().mean() if not exact else 0.5 * logs["penalty"]
        torch.testing.assert_close(penalty, wanted)


def dirac_radius(strength: float) -> float:
    """Distance from equilibrium after 2,000 steps from (1, 1): ``D = psi x``, real samples at 0."""
    psi, theta = torch.ones((), dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    psi.requires_grad_(True)
    theta.requires_grad_(True)
    game = AdversarialGame(False, strength, 1.0, strength > 0)
    real, none = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1)
    draws = AdversarialDraws(*[real] * 4, *[none] * 3)

    def judge(samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple((psi * x)[:, 0] for x in samples)

    for _ in range(2000):
        loss, _ = game.discriminator_loss(judge, real, theta.detach(), draws)
        psi.data -= 0.1 * torch.autograd.grad(loss, psi)[0]
        loss = game.student_loss(judge, real, theta, none)
        theta.data -= 0.1 * torch.autograd.grad(loss, theta)[0]
    return float(torch.stack([psi, theta[0, 0]]).norm().detach())


@pytest.mark.slow
def test_the_dirac_gan_closes_in_as_fast_as_the_penalty_says() -> None:
    assert dirac_radius(0.0) == pytest.approx(0.20, abs=0.005)
    assert dirac_radius(0.01) == pytest.approx(0.053, abs=0.001)


# ---------------------------------------------------------------------- Dirac GANs

RADII = {0.0: 0.20, 0.001: 0.18, 0.01: 0.053, 0.1: 1.7e-9, 1.0: 3.7e-12}
"""How far from equilibrium a Dirac GAN ends, by ``penalty * sigma**2``."""


def dirac_paths(perturbations: Callable[[], Tensor], updates: int = 2000) -> Tensor:
    """Distances from equilibrium ``(updates, G)`` of several GANs at once, from (1, 1) each.

    They share a batch, in which each has rows of its own and a discriminator ``D = psi x`` of its
    own. So a penalty's strength is the size of these rows' perturbations.

    Args:
        perturbations: draws those of one update, ``(G, N)`` for ``N`` samples each.
    """
    games, each = perturbations().shape
    psi, theta = torch.ones(2, games, dtype=torch.float64).unbind()
    psi.requires_grad_(True)
    theta.requires_grad_(True)
    game = AdversarialGame(False, 1.0, 1.0, False)
    real, none = torch.zeros(games * each, 1, dtype=torch.float64), torch.zeros(1)

    def rows(values: Tensor) -> Tensor:
        return values.repeat_interleave(each)[:, None]

    def judge(samples: Sequence[Tensor], _positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple((rows(psi) * x)[:, 0] for x in samples)

    path = []
    for _ in range(updates):
        moved = perturbations().reshape(-1, 1)
        draws = AdversarialDraws(real, real, moved, real, none, none, none)
        loss, _ = game.discriminator_loss(judge, real, rows(theta.detach()), draws)
        psi.data -= 0.1 * games * torch.autograd.grad(loss, psi)[0]
        loss = game.student_loss(judge, real, rows(theta), none)
        theta.data -= 0.1 * games * torch.autograd.grad(loss, theta)[0]
        path.append(torch.stack([psi, theta]).detach().norm(dim=0))
    return torch.stack(path)


@pytest.mark.slow
def test_dirac_gans_of_all_strengths_end_where_they_are_known_to() -> None:
    """Here the approximated penalty is exactly ``sigma**2 psi**2``, on average over its draws."""
    sizes = torch.tensor(list(RADII), dtype=torch.float64).sqrt()[:, None]
    ends = dirac_paths(lambda: sizes)[-1]
    assert ends.tolist() == pytest.approx(list(RADII.values()), rel=0.03, abs=0)


@pytest.mark.slow
def test_a_sampled_penalty_leads_along_the_path_of_the_exact_one() -> None:
    """With 256 draws an update; 2.3% off at most with these."""
    made = torch.Generator().manual_seed(0)
    strength = torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)

    def sampled() -> Tensor:
        noise = torch.randn(3, 256, generator=made, dtype=torch.float64)
        return strength.sqrt()[:, None] * noise

    psi, theta, wanted = torch.ones_like(strength), torch.ones_like(strength), []
    for _ in range(300):
        psi = psi - 0.1 * (theta * (psi * theta).sigmoid() + 2 * strength * psi)
        theta = theta + 0.1 * psi * (-psi * theta).sigmoid()
        wanted.append(torch.hypot(psi, theta))
    torch.testing.assert_close(dirac_paths(sampled, 300), torch.stack(wanted), rtol=0.05, atol=0)


@pytest.mark.parametrize("relativistic", [False, True])
def test_only_pairs_leave_a_constant_that_is_added_to_all_logits_unseen(
    relativistic: bool,
) -> None:
    """By either side's loss, penalties and all."""
    critic, (real, fake, draws) = Critic(), vectors(32)
    game = AdversarialGame(relativistic, 10.0, 0.1, False)

    def losses(constant: float) -> Tensor:
        def judge(samples: Sequence[Tensor], positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(logits + constant for logits in critic.judge(samples, positions))

        theirs, _ = game.discriminator_loss(judge, real, fake, draws)
        return torch.stack([theirs, game.student_loss(judge, real, fake, draws.student_position)])

    change = (losses(5.0) - losses(0.0)).abs()
    assert (change < 1e-12).tolist() == [relativistic] * 2
