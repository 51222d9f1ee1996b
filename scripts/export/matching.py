"""Which scheduler of diffusers samples exactly as a student does.

Nothing is taken for granted: each candidate is run beside the student's own sampler on a made-up
network, and is taken only if it visits the same times and ends at the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from fewstep.diffusion import Backbone, Denoiser
from fewstep.diffusion.schedules import FlowSchedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks.parts import quiet
from scripts.export.chains import Chain

TOLERANCE = 1e-4
"""Largest relative difference of float32 chains that counts as rounding."""

OWN_SIGMAS = ("FluxPipeline", "LTXPipeline")
"""Pipelines that hand their scheduler ``linspace(1, 1 / k, k)`` before its shift."""

Arguments = dict[str, Any]


@dataclass(frozen=True)
class FrontEnd:
    """How a pipeline lets its caller steer the scheduler.

    Attributes:
        takes: which of ``timesteps``, ``sigmas`` and ``eta`` its call takes.
        own_sigmas: whether it hands the scheduler evenly spaced sigmas of its own.
    """

    takes: frozenset[str]
    own_sigmas: bool = False

    @classmethod
    def of(cls, pipeline: str) -> FrontEnd:
        """That of a pipeline's class."""
        parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
        takes = {"timesteps", "sigmas", "eta"} & set(parameters)
        own_sigmas = pipeline in OWN_SIGMAS
        if own_sigmas:
            takes -= {"timesteps"}  # it would hand over both, which schedulers refuse
        return cls(frozenset(takes), own_sigmas)


@dataclass(frozen=True)
class Steering:
    """What must be said besides the number of steps.

    Attributes:
        arguments: of the pipeline's call.
        visit: of the scheduler's ``set_timesteps``, where the pipeline's call does not take it.
    """

    arguments: Arguments = field(default_factory=dict)
    visit: Arguments = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A scheduler that samples as the student does, and how for each step count."""

    scheduler: Any
    steering: dict[int, Steering]
    deviation: float


class _Waves(Backbone):
    """A made-up network: smooth, and different at every time and place."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (8, 2, 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        phase = t.view(-1, *[1] * (x_t.ndim - 1)) / 150
        return 0.8 * torch.sin(x_t + phase) + 0.4 * torch.cos(2 * phase)


def find_match(denoiser: Denoiser, chains: Sequence[Chain], front: FrontEnd, grid: int) -> Match:
    """The scheduler that does exactly what these chains do, asked for as plainly as possible.

    Args:
        denoiser: the student.
        chains: for each step count.
        front: of the pipeline.
        grid: number of the student's solver points.

    Raises:
        FewstepError: if diffusers has none.
    """
    quiet()
    probe = Denoiser(_Waves(), denoiser.schedule, denoiser.prediction_type, denoiser.alpha_floor)
    best: tuple[int, Match] | None = None
    # A chain of one step may be of either kind: its jump is the same.
    leading = next((chain for chain in chains if chain.renoise), chains[0])
    for scheduler, always in _candidates(denoiser, leading.renoise, grid):
        if not set(always) <= front.takes:
            continue
        found = [_steering(scheduler, always, chain, probe, front) for chain in chains]
        exact = [one for one in found if one is not None]
        if len(exact) == len(chains):
            effort = max(one[0] for one in exact)
            if best is None or effort < best[0]:
                steering = {c.num_steps: one[1] for c, one in zip(chains, exact, strict=True)}
                best = effort, Match(scheduler, steering, max(one[2] for one in exact))
    if best is None:
        raise FewstepError(_explain(denoiser, leading))
    return best[1]


def _candidates(denoiser: Denoiser, renoise: bool, grid: int) -> Iterator[tuple[Any, Arguments]]:
    """Schedulers that may do, the most common first, and what each must be told at every step."""
    schedule = denoiser.schedule
    if isinstance(schedule, FlowSchedule):
        names = ["FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"]
        for name in ["FlowMatchLCMScheduler"] if renoise else names:
            cls = getattr(diffusers, name, None)  # the second is in recent versions only
            if cls is not None:
                yield cls(shift=schedule.shift), {}
    if not isinstance(schedule, VPSchedule):
        return
    clean = schedule.t_min == schedule.t_clean
    common = {name: v for name, v in schedule.config.items() if name != "trajectory_end"}
    common |= {"prediction_type": denoiser.prediction_type, "steps_offset": 1}
    ends = {"set_alpha_to_one": clean, "clip_sample": False, "thresholding": False}
    if renoise:
        # LCM's c_skip and c_out then are 0 and 1 at every time, as they are in the sampler.
        lcm = {"original_inference_steps": grid, "timestep_scaling": 1e4}
        yield diffusers.LCMScheduler(**common, **ends, **lcm), {}
        # With eta 1 it jumps to train index 0 and draws from the forward kernel there.
        tcd = diffusers.TCDScheduler(**common, **ends, original_inference_steps=grid)
        yield tcd, {"eta": 1.0}
        return
    yield diffusers.DDIMScheduler(**common, **ends, timestep_spacing="trailing"), {}
    yield diffusers.TCDScheduler(**common, **ends, original_inference_steps=grid), {"eta": 0.0}
    yield (
        diffusers.DPMSolverMultistepScheduler(
            **common,
            solver_order=1,  # which is DDIM, at any times
            thresholding=False,
            final_sigmas_type="zero" if clean else "sigma_min",
        ),
        {},
    )


def _steering(
    scheduler: Any, always: Arguments, chain: Chain, probe: Denoiser, front: FrontEnd
) -> tuple[int, Steering, float] | None:
    """The plainest way to make a scheduler follow a chain: effort, way and deviation."""
    explicit = _explicit_times(chain, probe)
    (name,) = explicit
    in_call = Steering({**always, **explicit}) if name in front.takes else None
    ways = [Steering(always), in_call, Steering(always, visit=explicit)]
    for effort, way in enumerate(ways):
        if way is None:
            continue
        times = {**way.visit, **{n: v for n, v in way.arguments.items() if n == name}}
        if not times:
            times = {"num_inference_steps": chain.num_steps}
            if front.own_sigmas:
                times["sigmas"] = [1 - i / chain.num_steps for i in range(chain.num_steps)]
        deviation = _deviation(scheduler, times, always, chain, probe)
        if deviation <= TOLERANCE:
            return effort, way, deviation
    return None


def _explicit_times(chain: Chain, probe: Denoiser) -> Arguments:
    """The visited times as ``set_timesteps`` takes them."""
    visited, schedule = chain.times[:-1], probe.schedule
    if not isinstance(schedule, FlowSchedule):
        return {"timesteps": [round(t) for t in visited.tolist()]}
    # Schedulers shift what they are given: sigma = s u / (1 + (s - 1) u).
    sigma, shift = visited / 1000, schedule.shift
    return {"sigmas": [round(u, 9) for u in (sigma / (shift - (shift - 1) * sigma)).tolist()]}


@torch.no_grad()
def _deviation(
    scheduler: Any, times: Arguments, step: Arguments, chain: Chain, probe: Denoiser
) -> float:
    """How far a scheduler ends from the student's own sampler, relative to the numbers' size."""
    try:
        scheduler.set_timesteps(**times)
    except (TypeError, ValueError):
        return float("inf")
    visited = scheduler.timesteps.double()
    if visited.shape != chain.times[:-1].shape or (visited - chain.times[:-1]).abs().max() > 1e-2:
        return float("inf")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn(4, *probe.sample_shape)
        state = torch.get_rng_state()
        ours = chain.sample(probe, noise)
        torch.set_rng_state(state)
        x = noise
        for t in scheduler.timesteps:
            output = probe.raw(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, **step, return_dict=False)[0]
    return float((x - ours).abs().max() / ours.abs().max().clamp_min(1))


def _explain(denoiser: Denoiser, chain: Chain) -> str:
    """Why there is no match, as far as can be told."""
    if denoiser.alpha_floor:
        return (
            f"This student divides by max(alpha, {denoiser.alpha_floor}) (alpha_floor), which no "
            "scheduler of diffusers does; train it without alpha_floor to export it."
        )
    how = "re-noises from" if chain.renoise else "ends at"
    visited = [round(t, 3) for t in chain.times[:-1].tolist()]
    return (
        f"No scheduler of diffusers samples as this student does: it {how} time "
        f"{float(chain.times[-1]):g}, visiting {visited} with {type(denoiser.schedule).__name__} "
        f"and {denoiser.prediction_type}. Sample it with `fewstep sample`, or train it with the "
        "schedule's other trajectory_end or another number of steps."
    )
