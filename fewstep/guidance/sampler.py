"""Sampling with training-free guidance, from any denoiser of the framework."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion import Cond, DenoiserLike
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.energies.base import row_counts
from fewstep.guidance.freezing import frozen
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.rounds import Guider, Walk
from fewstep.guidance.steps import DDIM, BaseStep, Step, plan_steps
from fewstep.guidance.trace import LARGEST_MOVE, Clock, Recorder, Trace
from fewstep.seeding import Generators, normal_like, torch_generator


@dataclass(frozen=True)
class GuidedSamples:
    """What a guided sampler returns: ``samples (B, ...)`` and how it went."""

    samples: Tensor
    trace: Trace


@torch.no_grad()
def guided_sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    guidance: Guidance,
    target: Target = None,
    generator: Generators = None,
    base: BaseStep | None = None,
    checkpointing: bool = False,
    largest_move: float | None = LARGEST_MOVE,
) -> GuidedSamples:
    """Samples along ``times (K + 1,)``, steered by the gradient of a loss of clean samples.

    Turns gradients on for itself, so it may be called under ``torch.no_grad``. The denoiser's
    parameters collect none. With :class:`fewstep.diffusion.Guided` as the denoiser,
    classifier-free guidance comes on top, and the gradient passes through both branches.

    A consistency or phased student is guided as any other denoiser: its jump to clean data stands
    where the posterior mean is. ``base`` makes the walk multistep consistency sampling
    (:func:`fewstep.guidance.students.consistency_steps`); the guidance's ``inner_steps`` give each
    of its few levels more than one gradient.

    Smoothing and augmentation draw from a stream of their own, so a run uses the same noise with
    and without them.

    Args:
        denoiser: predicts ``(x0, eps)``.
        noise: initial noise ``(B, ...)``.
        target: what the energy is told of each sample, ``(B, ...)``; for a sum of energies a
            mapping.
        generator: draws the noise of the base step and of time travel.
        base: how a step is taken without guidance; deterministic DDIM (Euler for flow) by default.
        checkpointing: computes the denoiser again in the backward pass, to save memory.
        largest_move: see :meth:`fewstep.guidance.trace.Trace.check`; None leaves the check out.

    Raises:
        FewstepError: if guidance diverged, or cannot be computed as asked.
    """
    refuse_what_cannot_be_guided(noise, target)
    steps = plan_steps(denoiser.schedule, times, base or DDIM())
    refuse_idle(guidance, steps)
    guider = Guider(guidance, target, Recorder(clock=Clock(noise.device)))
    walk = Walk(denoiser, cond, guider, own_stream(generator), checkpointing)
    x = noise.to(work_dtype(noise)) / steps[0].scale
    with frozen(denoiser, guidance.energy):
        for step in steps:
            for left in reversed(range(guidance.recurrence.rounds(step))):
                z = normal_like(x, generator) if step.noise_std else None
                arrived = walk.round(x, step, z)
                x = step.go_back(arrived, normal_like(x, generator)) if left else arrived
    samples = x * steps[-1].scale_s
    return GuidedSamples(samples, guider.recorder.close(samples, largest_move))


def own_stream(generator: Generators) -> Generators:
    """A stream of random numbers beside a generator's, without drawing from it.

    It follows from the generator's state: the next batch of the same generator has another one if
    the generator drew anything in between, such as that batch's initial noise.
    """
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return _beside(generator, generator.device)
    return [_beside(one, "cpu") for one in generator]  # as normal_like takes them


def _beside(generator: torch.Generator, device: torch.device | str) -> torch.Generator:
    state = zlib.crc32(generator.get_state().numpy().tobytes())
    return torch_generator(state, "guidance", device=device)


def refuse_what_cannot_be_guided(noise: Tensor, target: Target) -> None:
    """Refuses a run that forbids gradients, or with another number of targets than of samples.

    Raises:
        FewstepError: in either case.
    """
    for count in row_counts(target):
        if count != len(noise):
            raise FewstepError(
                f"{count} targets were given for {len(noise)} samples; give each sample its own."
            )
    if torch.is_inference_mode_enabled() or noise.is_inference():
        raise FewstepError(
            "Guidance takes gradients, which torch.inference_mode forbids. Sample under "
            "torch.no_grad instead; for Lightning, set inference_mode: false on the trainer."
        )


def refuse_idle(guidance: Guidance, steps: Sequence[Step]) -> None:
    """Refuses guidance that moves nothing on its way.

    Raises:
        FewstepError: if no step is in its window, or if its rules give none of the guided ones any
            length: a share of the noise that is left, where all end at clean data, or of the
            signal, where all begin at pure noise.
    """
    window = guidance.window
    guided = [step for step in steps if window.holds(step)]
    if not guided:
        times = ", ".join(f"{step.t:g}" for step in steps[:8]) + (", ..." if steps[8:] else "")
        raise FewstepError(
            f"Guidance acts at no step: none of the times {times} is in its window (above low "
            f"{window.low:g}, up to high {window.high:g}, every {window.every}). Widen the "
            "window, or take more steps."
        )
    if not any(guidance.acts_at(step) for step in guided):
        raise FewstepError(
            "Guidance would move nothing: its rules give a step of no length at each of the guided "
            f"times {', '.join(f'{step.t:g}' for step in guided[:8])}. Capped moves by a share of "
            "the noise that is left at a step's end, and there is none at clean data: set "
            "inner_steps: 1 or more, which act at its start, or take more steps. Rules with the "
            "weight signal or increase, such as FreeDoM's, move by a share of the signal, and a "
            "flow model has none at pure noise: take the weight constant, Normalised or Polyak."
        )
