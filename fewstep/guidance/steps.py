"""The steps of a sampler in coordinates that all schedules share.

Guidance rules speak of lengths: of a gradient, of a displacement, of the noise. They mean the same
for every schedule only in one set of coordinates, so the state is kept as
``x / sqrt(alpha^2 + sigma^2)``, in which each schedule is variance preserving. A flow model and a
diffusion model with the same denoiser then take the same guided steps.

Times are the same for a whole batch, so levels are plain numbers, known before the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion import Schedule
from fewstep.errors import FewstepError

SMALLEST_SIGNAL = 1e-6


class BaseStep(ABC):
    """How much of the noise at the end of a step is drawn anew."""

    @abstractmethod
    def noise_std(self, ratio: float, sigma: float, sigma_s: float) -> float:
        """Standard deviation of the fresh noise, between 0 and ``sigma_s``.

        Args:
            ratio: ``alpha / alpha_s`` of the step.
            sigma, sigma_s: noise levels at its start and end.
        """


@dataclass(frozen=True)
class DDIM(BaseStep):
    """The DDIM family (Song et al. 2021, eq. 16); Euler for flow models when ``eta`` is 0.

    Args:
        eta: 0 follows the probability-flow ODE, 1 is the DDPM posterior.
    """

    eta: float = 0.0

    def noise_std(self, ratio: float, sigma: float, sigma_s: float) -> float:
        return self.eta * sigma_s / sigma * math.sqrt(max(1 - ratio**2, 0.0))


@dataclass(frozen=True)
class FixedShare(BaseStep):
    """A fixed share of the remaining noise level is fresh.

    Args:
        share: 0.5 is what the released FreeDoM code calls DDIM with eta 0.5; 1 replaces all noise,
            which is multistep consistency sampling.
    """

    share: float = 0.5

    def noise_std(self, ratio: float, sigma: float, sigma_s: float) -> float:
        return self.share * sigma_s


@dataclass(frozen=True)
class Step:
    """One step ``t -> s``, in variance-preserving coordinates (``alpha^2 + sigma^2 = 1``).

    Attributes:
        index: its number, from 0.
        t, s: times in the network's own unit.
        alpha, sigma, alpha_s, sigma_s: levels at start and end.
        scale, scale_s: the network's own state is this many times ours.
        noise_std: standard deviation of the fresh noise.
        increase, decrease: weights proportional to ``a = (alpha / alpha_s)^2`` and to ``1 - a``,
            with a mean of 1 over all steps (the schedules of TFG, Ye et al. 2024).
    """

    index: int
    t: float
    s: float
    alpha: float
    sigma: float
    alpha_s: float
    sigma_s: float
    scale: float
    scale_s: float
    noise_std: float
    increase: float
    decrease: float

    @property
    def ratio(self) -> float:
        """``alpha / alpha_s``, the papers' ``sqrt(a_t)``; 1 for a step that stays in place."""
        return 1.0 if self.alpha == self.alpha_s else self.alpha / self.alpha_s

    @property
    def kept_std(self) -> float:
        """Level of the predicted noise that the step keeps."""
        return math.sqrt(max(self.sigma_s**2 - self.noise_std**2, 0.0))

    def divide(self, value: float, by: float) -> float:
        """``value / by``, where ``by`` is a signal level.

        Raises:
            FewstepError: where there is no signal to divide by.
        """
        if by < SMALLEST_SIGNAL:
            raise FewstepError(
                f"This guidance rule divides by the signal level, which is 0 at t = {self.t:g}. "
                f"Start guidance below it: set the window's high below {self.t:g}. For a sampler "
                "of one step, which has no time below it, use Normalised or Polyak with "
                "inner_steps, or optimise the initial noise."
            )
        return value / by

    def must_move(self, rule: str) -> None:
        """For rules that are proportional to a step's length.

        Raises:
            FewstepError: for a step that stays in place, where such a rule would do nothing.
        """
        if self.alpha == self.alpha_s:
            raise FewstepError(
                f"The guidance rule '{rule}' is a share of a step's length, and inner steps (like "
                "those of noise optimisation) stay in place, so it would do nothing. Use "
                "Scheduled with another weight, Normalised or Polyak, or set inner_steps: 0."
            )

    def in_place(self) -> Step:
        """The step that stays where it is, for what moves the state at its start."""
        return replace(self, alpha_s=self.alpha, sigma_s=self.sigma, noise_std=0.0)

    def arrive(self, x0: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        """The state at ``s`` from a prediction and fresh noise, all ``(B, ...)``."""
        arrived = self.alpha_s * x0 + self.kept_std * eps
        return arrived if z is None else arrived + self.noise_std * z

    def go_back(self, arrived: Tensor, noise: Tensor) -> Tensor:
        """Noises a state at ``s`` to ``t`` again (time travel; FreeDoM, Yu et al. 2023)."""
        return self.ratio * arrived + math.sqrt(max(1 - self.ratio**2, 0.0)) * noise


FINISHED = Step(0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0)
"""No step: what an energy is told that is asked of finished samples."""


def plan_steps(schedule: Schedule, times: Tensor, base: BaseStep) -> list[Step]:
    """The steps along descending ``times (K + 1,)``.

    Raises:
        FewstepError: if the times do not descend.
    """
    grid = times.detach().double().cpu()
    if len(grid) < 2 or bool((grid.diff() >= 0).any()):
        raise FewstepError(
            "A guided sampler needs two or more times, each below the one before; "
            f"it was given {grid.tolist()}."
        )
    return steps_between(grid, schedule.alpha(grid), schedule.sigma(grid), base)


def steps_between(times: Tensor, alpha: Tensor, sigma: Tensor, base: BaseStep) -> list[Step]:
    """The steps between given levels.

    Args:
        times, alpha, sigma: ``(K + 1,)`` float64, with times that descend.
    """
    scale = torch.hypot(alpha, sigma)
    rows = torch.stack([times, alpha / scale, sigma / scale, scale], dim=1).tolist()
    kept = [(now[1] / then[1]) ** 2 for now, then in pairwise(rows)]
    mean = sum(kept) / len(kept)
    return [
        Step(
            index=index,
            t=now[0],
            s=then[0],
            alpha=now[1],
            sigma=now[2],
            alpha_s=then[1],
            sigma_s=then[2],
            scale=now[3],
            scale_s=then[3],
            noise_std=base.noise_std(math.sqrt(a), now[2], then[2]),
            increase=a / mean if mean else 0.0,
            decrease=(1 - a) / (1 - mean),
        )
        for index, ((now, then), a) in enumerate(zip(pairwise(rows), kept, strict=True))
    ]
