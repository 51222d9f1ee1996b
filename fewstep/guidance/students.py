"""Few-step students: how their own samplers take a step, and the sampler as one function.

A guided sampler takes any denoiser. What sets a student apart is what happens between its jumps,
and that there are so few of them that a gradient can pass through all: from the finished sample
to the initial noise (:mod:`fewstep.guidance.noise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion import Cond, DenoiserLike, Schedule
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.guidance.rounds import predict
from fewstep.guidance.sampler import GuidedSamples
from fewstep.guidance.steps import DDIM, BaseStep, Step, plan_steps
from fewstep.guidance.trace import Clock, Recorder
from fewstep.seeding import Generators, normal_like


@dataclass(frozen=True)
class ConsistencySteps(BaseStep):
    """Multistep consistency sampling: a jump to the trajectory's end, then noise from there.

    With an end at clean data this is ``FixedShare(1)``. A trajectory that ends a little before
    keeps what noise the end has, and its last jump draws none.

    Args:
        sigma_end: noise level at the trajectory's end, in variance-preserving coordinates.
    """

    sigma_end: float = 0.0

    def noise_std(self, ratio: float, sigma: float, sigma_s: float) -> float:
        if _at_end(sigma_s, self.sigma_end):
            return 0.0
        alpha_s, alpha_end = math.sqrt(1 - sigma_s**2), math.sqrt(1 - self.sigma_end**2)
        kept = alpha_s / alpha_end * self.sigma_end
        return math.sqrt(max(sigma_s**2 - kept**2, 0.0))


@dataclass(frozen=True)
class PhasedSteps(BaseStep):
    """The chain of a phased student's edges (PCM, Wang et al. 2024, section 3.1 and eq. 44).

    Args:
        stochasticity: share of the noise's variance that is fresh on every jump but the last; 0
            is the deterministic chain.
        sigma_end: noise level at the trajectory's end, in variance-preserving coordinates.
    """

    stochasticity: float = 0.0
    sigma_end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.stochasticity <= 1:
            raise FewstepError(
                f"stochasticity is a share between 0 and 1, not {self.stochasticity}."
            )

    def noise_std(self, ratio: float, sigma: float, sigma_s: float) -> float:
        return 0.0 if _at_end(sigma_s, self.sigma_end) else math.sqrt(self.stochasticity) * sigma_s


def _at_end(sigma_s: float, sigma_end: float) -> bool:
    """Whether a step ends where the trajectory does, up to rounding."""
    return sigma_s <= sigma_end * (1 + 1e-9)


def consistency_steps(schedule: Schedule) -> ConsistencySteps:
    """The base step with which a guided walk is :func:`fewstep.diffusion.consistency_sample`."""
    return ConsistencySteps(_end_level(schedule))


def phased_steps(schedule: Schedule, stochasticity: float = 0.0) -> PhasedSteps:
    """The base step with which a guided walk is :func:`fewstep.diffusion.phased_sample`.

    The times to walk are the student's edges, from :class:`fewstep.diffusion.PhaseSchedule`.
    """
    return PhasedSteps(stochasticity, _end_level(schedule))


def _end_level(schedule: Schedule) -> float:
    """Noise level where trajectories end, in variance-preserving coordinates."""
    end = torch.tensor([schedule.t_min], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
    return sigma / math.hypot(alpha, sigma)


def one_step_times(schedule: Schedule) -> Tensor:
    """The two times of a single jump from pure noise to the trajectory's end."""
    return torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)


@dataclass(frozen=True)
class Chain:
    """A few-step sampler as one differentiable function of its initial state.

    Fresh noise that its steps need is drawn once, so that the same initial noise always gives the
    same sample.

    Attributes:
        steps: the steps, in variance-preserving coordinates.
        fresh: for each step its noise ``(B, ...)``, or None where it draws none.
        checkpointing: computes each jump again in the backward pass, to keep one in memory.
    """

    denoiser: DenoiserLike
    cond: Cond | None
    steps: list[Step]
    fresh: list[Tensor | None]
    checkpointing: bool = False

    @classmethod
    def drawn(
        cls,
        denoiser: DenoiserLike,
        like: Tensor,
        cond: Cond | None,
        times: Tensor,
        generator: Generators,
        base: BaseStep | None,
        checkpointing: bool = False,
    ) -> Chain:
        """A chain along ``times (K + 1,)`` with noise shaped like ``like (B, ...)``.

        It is the noise that :func:`fewstep.guidance.guided_sample` draws from the same generator.
        """
        steps = plan_steps(denoiser.schedule, times, base or DDIM())
        state = like.to(work_dtype(like))
        fresh = [normal_like(state, generator) if step.noise_std else None for step in steps]
        return cls(denoiser, cond, steps, fresh, checkpointing)

    def start(self, noise: Tensor) -> Tensor:
        """Initial noise as a state in variance-preserving coordinates, ``(B, ...)``."""
        return noise.to(work_dtype(noise)) / self.steps[0].scale

    def __call__(self, state: Tensor) -> Tensor:
        """Samples ``(B, ...)`` from initial states, with a graph where gradients are on."""
        for step, z in zip(self.steps, self.fresh, strict=True):
            seen = predict(self.denoiser, state, step, self.cond, self.checkpointing)
            state = step.arrive(seen.x0, seen.eps, z)
        return state * self.steps[-1].scale_s


@torch.no_grad()
def plain_sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    generator: Generators = None,
    base: BaseStep | None = None,
) -> GuidedSamples:
    """Samples without guidance, with their costs: what guidance is compared with.

    Takes the same steps and draws the same noise as :func:`fewstep.guidance.guided_sample`.
    """
    recorder = Recorder(denoiser_evaluations=len(times) - 1, clock=Clock(noise.device))
    chain = Chain.drawn(denoiser, noise, cond, times, generator, base)
    samples = chain(chain.start(noise))
    return GuidedSamples(samples, recorder.close(samples, None))
