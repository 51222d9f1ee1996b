"""The losses of Adversarial Post-Training: a plain GAN's, with penalties on the logits' slope.

Lin et al. 2025 (arXiv 2501.08316), sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.losses import (
    approximated_gradient_penalty,
    non_saturating_discriminator,
    non_saturating_generator,
    relativistic_discriminator,
    relativistic_generator,
)
from lightning_modules.optimisation import Draws

Judge = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""Logits ``(B,)`` of each of several lots of samples ``(B, ...)`` at positions ``(B,)`` in time, in
one call of the discriminator."""

PENALTIES = ("penalty", "fake_penalty")  # R1, of real samples, and R2, of generated ones


@dataclass(frozen=True)
class AdversarialDraws(Draws):
    """Randomness of one step.

    Noises ``(B, ...)`` of the samples that the discriminator and then the student learn from, and
    the perturbations ``(B, ...)`` of real and generated ones, empty ``(B, 0)`` where none is
    needed; positions ``(B,)`` in [0, 1) of the times that the discriminator is told, in its own
    turn and in the student's.
    """

    noise: Tensor
    student_noise: Tensor
    real_perturbation: Tensor
    fake_perturbation: Tensor
    real_position: Tensor
    fake_position: Tensor
    student_position: Tensor


@dataclass(frozen=True)
class AdversarialGame:
    """Which losses the two sides have.

    Attributes:
        relativistic: whether real and generated samples are compared in pairs, and both penalised.
        penalty, sigma: weight and size of the approximated penalties.
        exact: whether the penalties are the squared gradients that these approximate, with weight
            ``penalty * sigma**2``.
    """

    relativistic: bool
    penalty: float
    sigma: float
    exact: bool

    @property
    def perturbed(self) -> tuple[bool, bool]:
        """Whether real samples are perturbed, and whether generated ones are."""
        return bool(self.penalty), bool(self.penalty) and self.relativistic

    def discriminator_loss(
        self, judge: Judge, real: Tensor, fake: Tensor, draws: AdversarialDraws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, and what to log of it.

        Penalties are logged over ``sigma**2``, as the squared gradients that they estimate.

        Args:
            real, fake: samples ``(B, ...)`` in float32; the generated ones without a graph.
        """
        exact = self.exact and torch.is_grad_enabled()
        look = self._exact if exact else self._approximated
        real_logits, fake_logits, penalties = look(judge, real, fake, draws)
        game = relativistic_discriminator if self.relativistic else non_saturating_discriminator
        loss = game([real_logits], [fake_logits])
        logs = {"discriminator": loss, **penalties}
        logs["real_score"], logs["fake_score"] = real_logits.mean(), fake_logits.mean()
        logs["logit_gap"] = logs["real_score"] - logs["fake_score"]
        return loss + self.penalty * self.sigma**2 * sum(penalties.values()), logs

    def student_loss(self, judge: Judge, real: Tensor, fake: Tensor, position: Tensor) -> Tensor:
        """The student's loss; real samples matter only where they are paired with."""
        if not self.relativistic:
            return non_saturating_generator(judge([fake], [position]))
        with torch.no_grad():  # no gradient passes through real samples
            (real_logits,) = judge([real], [position])
        (fake_logits,) = judge([fake], [position])
        return relativistic_generator([real_logits], [fake_logits])

    def evaluations(self) -> tuple[int, int]:
        """Forward and backward passes of the discriminator, in both turns together."""
        own = 2 + (0 if self.exact else sum(self.perturbed))
        return own + (2 if self.relativistic else 1), own + 1

    def _approximated(
        self, judge: Judge, real: Tensor, fake: Tensor, draws: AdversarialDraws
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits, and ``|D(x) - D(x + sigma n)|^2 / sigma^2`` (eq. 8).

        Clean and perturbed samples are told the same time, and both branches carry gradient.
        """
        real_perturbed, fake_perturbed = self.perturbed
        samples, positions = [real, fake], [draws.real_position, draws.fake_position]
        if real_perturbed:
            samples.append(real + self.sigma * draws.real_perturbation)
            positions.append(draws.real_position)
        if fake_perturbed:
            samples.append(fake + self.sigma * draws.fake_perturbation)
            positions.append(draws.fake_position)
        real_logits, fake_logits, *perturbed = judge(samples, positions)
        pairs = zip(PENALTIES, (real_logits, fake_logits), perturbed, strict=False)
        penalties = {
            name: approximated_gradient_penalty([clean], [moved]) / self.sigma**2
            for name, clean, moved in pairs
        }
        return real_logits, fake_logits, penalties

    def _exact(
        self, judge: Judge, real: Tensor, fake: Tensor, draws: AdversarialDraws
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits, and the squared gradients, whose own gradient is a second derivative."""
        leaves = [real.detach().requires_grad_(True), fake.detach().requires_grad_(True)]
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
            real_logits, fake_logits = judge(leaves, [draws.real_position, draws.fake_position])
        total = real_logits.sum() + fake_logits.sum()
        penalised = PENALTIES if self.relativistic else PENALTIES[:1]
        gradients = torch.autograd.grad(total, leaves[: len(penalised)], create_graph=True)
        squares = [gradient.square().flatten(1).sum(1).mean() for gradient in gradients]
        return real_logits, fake_logits, dict(zip(penalised, squares, strict=True))
