"""Samplers: pure functions from noise to samples.

Each takes a denoiser, noise ``(B, ...)``, conditioning, descending times and, where it draws, a
generator on the noise's device or one on the CPU for each sample; each returns the sample at the
last time. They know nothing of guidance: wrap the denoiser
(:class:`fewstep.diffusion.denoiser.Guided`) to steer any of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.ancestral import TellsVariance, between, log_variances, posterior_mean
from fewstep.diffusion.denoiser import Cond, DenoiserLike
from fewstep.diffusion.prediction import Prediction
from fewstep.seeding import Generators, normal_like


def solver_step(
    denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None
) -> Tensor:
    """One first-order step of the probability-flow ODE, ``t -> s``, both ``(B,)``.

    DDIM for variance-preserving schedules, Euler for flow matching.
    """
    return denoiser.schedule.jump(denoiser(x_t, t, cond), s)


def _batch_times(times: Tensor, noise: Tensor) -> Tensor:
    """Repeats each of ``times (K,)`` over the batch: ``(K, B)`` on the noise's device."""
    return times.to(noise.device).unsqueeze(1).expand(-1, noise.shape[0])


@torch.no_grad()
def ode_sample(denoiser: DenoiserLike, noise: Tensor, cond: Cond | None, times: Tensor) -> Tensor:
    """Follows the probability-flow ODE down ``times (K + 1,)`` with ``K`` evaluations."""
    x = noise
    steps = _batch_times(times, noise)
    for t, s in pairwise(steps):
        x = solver_step(denoiser, x, t, s, cond)
    return x


@torch.no_grad()
def phased_sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    generator: Generators = None,
    stochasticity: float = 0.0,
) -> Tensor:
    """Chains a phased student's jumps from edge to edge (PCM, section 3.1).

    Args:
        times: the phase edges, descending, ``(M + 1,)``.
        generator: draws the fresh noise; needed when ``stochasticity > 0``.
        stochasticity: ``1 - r`` of PCM's eq. 44, which replaces the predicted noise by
            ``sqrt(r) eps + sqrt(1 - r) z`` on every jump but the last. 0 is deterministic, 1 is
            LCM-like; for more than one phase it preserves the distribution only approximately.
    """
    if not 0 <= stochasticity <= 1:
        raise ValueError(f"stochasticity must lie in [0, 1], got {stochasticity}.")
    if stochasticity == 0:
        return ode_sample(denoiser, noise, cond, times)
    x = noise
    steps = _batch_times(times, noise)
    keep, fresh = (1 - stochasticity) ** 0.5, stochasticity**0.5
    for index, (t, s) in enumerate(pairwise(steps)):
        prediction = denoiser(x, t, cond)
        if index < len(steps) - 2:
            z = normal_like(x, generator)
            prediction = Prediction(prediction.x0, keep * prediction.eps + fresh * z)
        x = denoiser.schedule.jump(prediction, s)
    return x


@torch.no_grad()
def consistency_sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    generator: Generators = None,
) -> Tensor:
    """Multistep consistency sampling: jump to the end, re-noise to the next time, repeat.

    Song et al. 2023, algorithm 1; no noise after the last jump. Re-noising uses the forward kernel
    from the trajectory's end, so marginals are right whether it ends at clean data or at index 0.

    Args:
        times: visited times, descending, then the end: ``(K + 1,)``.
    """
    x = noise
    steps = _batch_times(times, noise)
    end = steps[-1]
    for index, t in enumerate(steps[:-1]):
        if index:
            z = normal_like(x, generator)
            x = denoiser.schedule.renoise(x, end, t, z)
        x = solver_step(denoiser, x, t, end, cond)
    return x


@torch.no_grad()
def one_step_sample(denoiser: DenoiserLike, noise: Tensor, cond: Cond | None = None) -> Tensor:
    """A single jump from pure noise to the trajectory's end."""
    schedule = denoiser.schedule
    return ode_sample(denoiser, noise, cond, torch.tensor([schedule.t_max, schedule.t_min]))


@torch.no_grad()
def ancestral_sample(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    generator: Generators = None,
) -> Tensor:
    """Draws each step from the reverse process down ``times (K + 1,)`` (Ho et al. 2020).

    With learned variances where the denoiser tells them, else with the greatest, the forward
    step's, as DDPM (and ADM's ``fixed large``). The last step, to clean data, adds no noise.
    """
    schedule, x = denoiser.schedule, noise
    for index, (t, s) in enumerate(pairwise(_batch_times(times, noise))):
        told: Tensor | None = None
        if isinstance(denoiser, TellsVariance):
            prediction, told = denoiser.with_variance(x, t, cond)
        else:
            prediction = denoiser(x, t, cond)
        mean = posterior_mean(schedule, prediction.x0, x, t, s)
        if index == len(times) - 2:
            return mean
        least, greatest = log_variances(schedule, t, s)
        if told is None:
            told = torch.ones_like(mean)
        x = mean + (between(told, least, greatest) / 2).exp() * normal_like(mean, generator)
    return x
