"""What a student's own sampler visits, read from the record in its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import DenoiserLike, PhaseSchedule, consistency_sample, ode_sample
from fewstep.diffusion.schedules import Schedule
from fewstep.errors import FewstepError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Chain:
    """The times of one sampling chain and what is done at each.

    Attributes:
        times: descending, the end last, ``(K + 1,)`` float64.
        renoise: whether each step jumps to the end and adds fresh noise up to the next time;
            otherwise it goes straight to the next time.
        note: what of the student's own sampling this leaves out, if anything.
    """

    times: Tensor
    renoise: bool
    note: str = ""

    @property
    def num_steps(self) -> int:
        """Network evaluations without guidance."""
        return len(self.times) - 1

    def sample(self, denoiser: DenoiserLike, noise: Tensor) -> Tensor:
        """Runs it without a condition; fresh noise comes from torch's global generator."""
        run = consistency_sample if self.renoise else ode_sample
        return run(denoiser, noise, None, self.times)


def _consistency(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    grid = PhaseSchedule.from_config(record["phases"]).grid.times.home.flip(0)
    if not 1 <= num_steps <= len(grid):
        raise FewstepError(
            f"A student on {len(grid)} grid points serves 1 to {len(grid)} steps, not {num_steps}."
        )
    end = schedule.t_clean if record["boundary"] == "lcm" else schedule.t_min
    visited = grid[torch.arange(num_steps) * len(grid) // num_steps]
    return Chain(torch.cat([visited, visited.new_tensor([end])]), renoise=True)


def _phased(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    times = PhaseSchedule.from_config(record["phases"]).sampling_times(num_steps)
    chain = Chain(times, renoise=False)
    stochasticity = record.get("sampling", {}).get("stochasticity", 0.0)
    if stochasticity == 0 or num_steps == 1:
        return chain
    if stochasticity == 1 and schedule.t_min == schedule.t_clean:
        return replace(chain, renoise=True)
    return replace(
        chain,
        note=(
            f"The student was trained to be sampled with stochasticity {stochasticity:g}, which no "
            "scheduler of diffusers does: only its deterministic chain is exported."
        ),
    )


def _ode(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    return Chain(schedule.spaced_times(num_steps), renoise=False)


def _post_trained(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    renoise = record["sampling"]["two_steps"] == "renoise"
    return Chain(schedule.spaced_times(num_steps), renoise)


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
            f"Students of {method} cannot be exported: what diffusers must do to sample as they do "
            f"is known for {', '.join(CHAINS)}."
        )
    return CHAINS[method](record, schedule, num_steps)


def default_steps(record: Record) -> list[int]:
    """The step counts an export is made for by default."""
    if record["method"] == "PhasedConsistencyDistillation":
        return [record["phases"]["num_phases"]]
    if CHAINS.get(record["method"]) is _consistency:
        return [steps for steps in (1, 2, 4, 8) if steps <= len(record["phases"]["times"])]
    return [1, 2] if record["method"] == "AdversarialPostTraining" else [8, 25, 50]
