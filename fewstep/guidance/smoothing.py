"""What is differentiated: an energy, averaged over random views of the clean estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.augmentors import PLAIN, Augmentor
from fewstep.guidance.energies import Energy, Target
from fewstep.guidance.energies.base import repeated
from fewstep.guidance.steps import Step
from fewstep.seeding import Generators, normal_like


@dataclass(frozen=True)
class Smoothing:
    """Gaussian noise about the clean estimate (LGD-MC, Song et al. 2023; TFG, Ye et al. 2024).

    Args:
        scale: how strong; 0 is off.
        copies: number of noisy copies.
        relative: the noise's standard deviation is ``scale * sigma(t)``, otherwise ``scale``.
        reduction: ``log_mean_exp`` averages ``exp(-loss)``, as the papers do; ``mean`` the losses.
    """

    scale: float = 0.0
    copies: int = 1
    relative: bool = True
    reduction: Literal["log_mean_exp", "mean"] = "log_mean_exp"

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise FewstepError(f"Smoothing needs one copy or more, got copies: {self.copies}.")

    @property
    def views(self) -> int:
        """Number of points the energy is asked at."""
        return self.copies if self.scale else 1

    def draw(self, like: Tensor, step: Step, generator: Generators) -> Tensor | None:
        """The noise ``(copies, B, ...)``, or None where smoothing is off."""
        if not self.scale:
            return None
        std = self.scale * (step.sigma if self.relative else 1.0)
        copies = like.new_empty((len(like), self.copies, *like.shape[1:]))
        return std * normal_like(copies, generator).transpose(0, 1)

    def reduce(self, losses: Tensor) -> Tensor:
        """One loss a sample ``(B,)`` from those of all copies ``(copies, B)``."""
        if self.reduction == "mean":
            return losses.mean(0)
        return math.log(len(losses)) - torch.logsumexp(-losses, dim=0)


SHARP = Smoothing()
"""No smoothing."""


@dataclass(frozen=True)
class Objective:
    """An energy, smoothed and augmented."""

    energy: Energy
    augmentor: Augmentor = PLAIN
    smoothing: Smoothing = SHARP

    @property
    def views(self) -> int:
        """Evaluations of the energy a sample for one value."""
        return self.smoothing.views * self.augmentor.copies

    def drawn(
        self, like: Tensor, target: Target, step: Step, generator: Generators
    ) -> Callable[[Tensor], Tensor]:
        """The loss ``(B, ...) -> (B,)`` with this round's random numbers.

        All gradients of one round see the same numbers; the next round draws new ones. Latents
        become pictures before views are made of these: once for each noisy copy, not for each view.
        Energies are computed without autocast, whatever the denoiser runs in.

        Args:
            like: any tensor shaped like the samples, ``(B, ...)``.
            target: what is wanted of each sample, ``(B, ...)``; for a sum of energies a mapping.

        Raises:
            FewstepError: when called, if the energy does not return one loss for each sample.
        """
        batch, views, copies = len(like), self.views, self.augmentor.copies
        noise = self.smoothing.draw(like, step, generator)
        uniform = self._uniform(like, generator)
        aims = repeated(target, views)
        prepare, energy = self.energy.staged()

        def losses(clean: Tensor) -> Tensor:
            points = clean.unsqueeze(0) if noise is None else clean + noise
            with torch.autocast(clean.device.type, enabled=False):
                seen = prepare(points.flatten(0, 1))
                rows = seen.repeat(copies, *[1] * (seen.ndim - 1))
                values = energy(*self.augmentor(rows, aims, uniform.to(rows.dtype)))
            if values.shape != (views * batch,):
                raise FewstepError(
                    f"{type(energy).__name__} returned losses of shape {tuple(values.shape)} "
                    f"for {views * batch} samples. An energy returns one loss for each sample: "
                    "average over all dimensions but the first."
                )
            return self.smoothing.reduce(values.reshape(copies, -1, batch).mean(0))

        return losses

    def _uniform(self, like: Tensor, generator: Generators) -> Tensor:
        """Numbers in (0, 1) for each view of each sample, ``(views B, numbers)``."""
        numbers = like.new_empty((len(like), self.views, self.augmentor.numbers))
        if self.augmentor.numbers:
            numbers = torch.special.ndtr(normal_like(numbers, generator))
        return numbers.transpose(0, 1).flatten(0, 1)
