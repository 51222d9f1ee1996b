"""Sampling with training-free guidance, from any denoiser of the framework."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.diffusion import Cond, DenoiserLike
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.rounds import Walk
from fewstep.guidance.steps import DDIM, BaseStep, plan_steps
from fewstep.guidance.trace import LARGEST_MOVE, Trace
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
    target: Tensor | None = None,
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
    where the posterior mean is. ``base=FixedShare(1)`` makes the walk multistep consistency
    sampling; the guidance's ``inner_steps`` give each of its few levels more than one gradient.

    Smoothing and augmentation draw from a stream of their own, so a run uses the same noise with
    and without them.

    Args:
        denoiser: predicts ``(x0, eps)``.
        noise: initial noise ``(B, ...)``.
        target: what the energy is told of each sample, ``(B, ...)``.
        generator: draws the noise of the base step and of time travel.
        base: how a step is taken without guidance; deterministic DDIM (Euler for flow) by default.
        checkpointing: computes the denoiser again in the backward pass, to save memory.
        largest_move: see :meth:`fewstep.guidance.trace.Trace.check`; None leaves the check out.

    Raises:
        FewstepError: if guidance diverged, or cannot be computed as asked.
    """
    _refuse_inference_mode(noise)
    if target is not None and len(target) != len(noise):
        raise FewstepError(
            f"{len(target)} targets were given for {len(noise)} samples; give each sample its own."
        )
    steps = plan_steps(denoiser.schedule, times, base or DDIM())
    walk = Walk(denoiser, cond, guidance, target, own_stream(generator), checkpointing)
    x = noise.to(work_dtype(noise)) / steps[0].scale
    with frozen(denoiser, guidance.energy):
        for step in steps:
            for left in reversed(range(guidance.recurrence.rounds(step))):
                z = normal_like(x, generator) if step.noise_std else None
                arrived = walk.round(x, step, z)
                x = step.go_back(arrived, normal_like(x, generator)) if left else arrived
    samples = x * steps[-1].scale_s
    trace = walk.recorder.trace(samples)
    if largest_move is not None:
        trace.check(largest_move)
    return GuidedSamples(samples, trace)


def own_stream(generator: Generators) -> Generators:
    """A stream of random numbers beside a generator's, without drawing from it.

    It follows from the generator's state: the next batch of the same generator has another one.
    """
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        state = zlib.crc32(generator.get_state().numpy().tobytes())
        return torch_generator(state, "guidance", device=generator.device)
    beside = [own_stream(one) for one in generator]
    return [one for one in beside if isinstance(one, torch.Generator)]


@contextmanager
def frozen(*things: object) -> Iterator[None]:
    """Parameters of modules, and of modules that things hold, ask for no gradient meanwhile.

    Gradients are only ever taken of the state; this saves the activations that those of the
    parameters would need.
    """
    modules = [m for thing in things for m in (thing, *getattr(thing, "__dict__", {}).values())]
    parameters = {p for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
    changed = [p for p in parameters if p.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def _refuse_inference_mode(noise: Tensor) -> None:
    if torch.is_inference_mode_enabled() or noise.is_inference():
        raise FewstepError(
            "Guidance takes gradients, which torch.inference_mode forbids. Sample under "
            "torch.no_grad instead; for Lightning, set inference_mode: false on the trainer."
        )
