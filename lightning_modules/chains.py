"""What a student's own sampler visits, read from the record in its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import (
    Cond,
    DenoiserLike,
    PhaseSchedule,
    consistency_sample,
    ode_sample,
    phased_sample,
)
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import FewstepError
from fewstep.guidance import DDIM, BaseStep
from fewstep.guidance.students import ConsistencySteps, PhasedSteps
from fewstep.seeding import Generators

Record = Mapping[str, Any]
PLAIN_ODE: Record = {"method": "DiffusionTraining"}
"""The record of a network that was not trained for few steps."""


@dataclass(frozen=True)
class Chain:
    """The times of one sampling chain and what is done at each.

    Attributes:
        times: descending, the end last, ``(K + 1,)`` float64.
        renoise: whether each step jumps to the end and adds fresh noise up to the next time;
            otherwise it goes straight to the next time.
        stochasticity: share of the noise's variance that is fresh in a chain that goes straight.
    """

    times: Tensor
    renoise: bool
    stochasticity: float = 0.0

    @property
    def num_steps(self) -> int:
        """Network evaluations without guidance."""
        return len(self.times) - 1

    def sample(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: Cond | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Samples ``(B, ...)`` as the method itself does."""
        if self.renoise:
            return consistency_sample(denoiser, noise, cond, self.times, generator)
        if self.stochasticity:
            times, share = self.times, self.stochasticity
            return phased_sample(denoiser, noise, cond, times, generator, share)
        return ode_sample(denoiser, noise, cond, self.times)

    def base(self, schedule: Schedule) -> BaseStep:
        """The base step with which a guided walk along the times is this chain."""
        end = self.times[-1:]
        alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
        level = sigma / math.hypot(alpha, sigma)
        if self.renoise:
            return ConsistencySteps(level)
        return PhasedSteps(self.stochasticity, level) if self.stochasticity else DDIM()


def consistency_chain(
    phases: PhaseSchedule, boundary: str, schedule: Schedule, num_steps: int
) -> Chain:
    """Multistep consistency sampling over evenly spaced grid points.

    Raises:
        FewstepError: for more steps than there are grid points.
    """
    grid = phases.grid.times.home.flip(0)
    if not 1 <= num_steps <= len(grid):
        raise FewstepError(
            f"A student on {len(grid)} grid points serves 1 to {len(grid)} steps, not {num_steps}."
        )
    visited = grid[torch.arange(num_steps) * len(grid) // num_steps]
    # LCM's own form is trained to give clean data; the jump ends where trajectories do.
    end = schedule.t_clean if boundary == "lcm" else schedule.t_min
    return Chain(torch.cat([visited, visited.new_tensor([end])]), renoise=True)


def phased_chain(
    phases: PhaseSchedule,
    schedule: Schedule,
    num_steps: int,
    stochasticity: float,
    allow_untrained: bool,
) -> Chain:
    """The jumps from edge to edge, at the very edges the student was trained on.

    A student of one phase is a consistency model: all its jumps end where trajectories do, so for
    several steps the sample is noised anew between them. (The released SD3 weights of one phase are
    sampled so; no share of the predicted noise is kept, whatever ``stochasticity`` says.)

    Raises:
        FewstepError: see :meth:`fewstep.diffusion.PhaseSchedule.sampling_times` and, for one phase,
            :func:`consistency_chain`.
    """
    if phases.num_phases == 1 and num_steps > 1:
        return consistency_chain(phases, "jump", schedule, num_steps)
    times = phases.sampling_times(num_steps, allow_untrained)
    return Chain(times, renoise=False, stochasticity=stochasticity if num_steps > 1 else 0.0)


def _consistency(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    phases = PhaseSchedule.from_config(record["phases"])
    return consistency_chain(phases, record["boundary"], schedule, num_steps)


def _phased(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    phases, sampling = PhaseSchedule.from_config(record["phases"]), record.get("sampling", {})
    untrained = sampling.get("allow_untrained_steps", False)
    stochasticity = sampling.get("stochasticity", 0.0)
    return phased_chain(phases, schedule, num_steps, stochasticity, untrained)


def _ode(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    return Chain(schedule.spaced_times(num_steps), renoise=False)


def post_trained_chain(schedule: Schedule, num_steps: int, two_steps: str) -> Chain:
    """One jump; between several, ``two_steps`` says whether the sample is noised anew."""
    return Chain(schedule.spaced_times(num_steps), renoise=two_steps == "renoise")


def _post_trained(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    return post_trained_chain(schedule, num_steps, record["sampling"]["two_steps"])


CHAINS: dict[str, Callable[[Record, Schedule, int], Chain]] = {
    "ConsistencyDistillation": _consistency,
    "MotionConsistencyDistillation": _consistency,
    "PhasedConsistencyDistillation": _phased,
    "DiffusionTraining": _ode,
    "AdversarialPostTraining": _post_trained,
}


def chain_of(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    """The chain that a checkpoint's method samples with.

    Args:
        record: the checkpoint's metadata, which has the edges; they are never recomputed from
            ``num_steps``.
        schedule: the student's.

    Raises:
        FewstepError: for a method whose sampling is unknown here, or a step count it cannot serve.
    """
    method = record["method"]
    if method not in CHAINS:
        raise FewstepError(
            f"How students of {method} sample is unknown here, so they cannot be steered; it is "
            f"known for {', '.join(CHAINS)}."
        )
    return CHAINS[method](record, schedule, num_steps)


def default_steps(record: Record) -> list[int]:
    """The step counts that a checkpoint's method serves best."""
    if record["method"] == "PhasedConsistencyDistillation":
        return [record["phases"]["num_phases"]]
    if CHAINS.get(record["method"]) is _consistency:
        return [steps for steps in (1, 2, 4, 8) if steps <= len(record["phases"]["times"])]
    return [1, 2] if record["method"] == "AdversarialPostTraining" else [8, 25, 50]
