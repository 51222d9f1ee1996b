"""The reverse process itself: its exact kernel, learned variances and their bound.

Between ``s < t`` a Gaussian process has the kernel ``q(x_s | x_t, x_0)``, a Gaussian, for any
schedule (Ho et al. 2020, eq. 6 and 7, is ``s = t - 1``). Its variance is the least that a reverse
step has; the forward step's own, ``q(x_t | x_s)``, is the most. A network with learned variances
says for each value where between the two, on a log scale, it lies (Nichol & Dhariwal 2021, eq. 15).
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Cond
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule, VPSchedule
from fewstep.diffusion.tables import expand_to, work_dtype
from fewstep.errors import FewstepError

LEVELS = 255
"""Steps between the least and the greatest of 8-bit values, which lie in [-1, 1]."""


@runtime_checkable
class TellsVariance(Protocol):
    """A denoiser that says where variances lie, from -1 (the least) to 1 (the most)."""

    def with_variance(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor | None]: ...


def posterior_mean(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Mean of ``q(x_s | x_t, x_0)``, ``(B, ...)``, for times ``s < t (B,)``."""
    kept = (schedule.sigma(s) / schedule.sigma(t)).square()
    of_x0 = schedule.alpha(s) * _forward_variance(schedule, t, s) / schedule.sigma(t).square()
    of_x_t = schedule.alpha(t) / schedule.alpha(s) * kept
    dtype = work_dtype(x_t)
    return expand_to(of_x0.to(dtype), x0) * x0 + expand_to(of_x_t.to(dtype), x_t) * x_t


def log_variances(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of a reverse step's least and greatest variance, each ``(B,)``.

    The least is ``-inf`` for a step to clean data.
    """
    greatest = _forward_variance(schedule, t, s).log()
    return greatest + 2 * (schedule.sigma(s).log() - schedule.sigma(t).log()), greatest


def _forward_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Variance of ``q(x_t | x_s)``, ``(B,)``."""
    carried = schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s)
    return schedule.sigma(t).square() - carried.square()


def between(told: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Log variances ``(B, ...)`` where a network says that they lie between bounds ``(B,)``.

    ``(told + 1) / 2`` is Nichol & Dhariwal's ``v``, which a network may also take out of [0, 1].
    """
    low, high = (expand_to(bound.to(told.dtype), told) for bound in (least, greatest))
    return low + (told + 1) / 2 * (high - low)


def variational_bound(
    schedule: VPSchedule, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, told: Tensor
) -> Tensor:
    """A time's term of the bound on the likelihood, in bits a value, ``(B,)``.

    The divergence of the reverse step from the true one, at index 0 the likelihood of the 8-bit
    values themselves (Nichol & Dhariwal 2021, L_vlb; Ho et al. 2020, eq. 5 and 13). Latents are
    read as 8-bit values there too, as DiT's code does.

    Args:
        x0, x_t: clean and noisy samples, ``(B, ...)``.
        t: train indices ``(B,)``.
        predicted: what the network takes for ``x0``; detach it, so that variances alone learn.
        told: where the network says that variances lie, see :func:`between`.
    """
    # Index 0 leads to clean data, where the least variance is none: it borrows that of index 1.
    s = t - 1
    inner = t.clamp_min(1)
    least, _ = log_variances(schedule, inner, inner - 1)
    _, greatest = log_variances(schedule, t, s)
    mean = posterior_mean(schedule, predicted, x_t, t, s)
    log_variance = between(told, least, greatest)
    true = posterior_mean(schedule, x0, x_t, t, s)
    divergence = _divergence(true, expand_to(least.to(x0.dtype), x0), mean, log_variance)
    surprise = _surprise(x0, mean, log_variance / 2)
    terms = torch.where(expand_to(t, x0) < 1, surprise, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def _divergence(mean: Tensor, log: Tensor, other_mean: Tensor, other_log: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a Gaussian from another, of each value, in nats."""
    ratio = (log - other_log).exp()
    distance = (mean - other_mean).square() * (-other_log).exp()
    return 0.5 * (ratio + distance - 1 + other_log - log)


def _surprise(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Negative log likelihood of 8-bit values in [-1, 1] under a Gaussian, in nats.

    The lowest value stands for all below it too, and the highest for all above. Where a Gaussian's
    mass rounds to nothing, the surprise is bounded, as in Ho et al.'s code.
    """
    scale = (-log_std).exp()
    below = torch.special.ndtr((x0 - mean - 1 / LEVELS) * scale)
    above = torch.special.ndtr((x0 - mean + 1 / LEVELS) * scale)
    below = torch.where(x0 < -0.999, 0, below)
    above = torch.where(x0 > 0.999, 1, above)
    return -(above - below).clamp_min(1e-12).log()


def ancestral_times(schedule: Schedule, num_steps: int) -> Tensor:
    """``num_steps + 1`` descending times from pure noise to clean data, float64.

    Train indices evenly spaced from the last to the first, both of them visited, as ADM and DiT
    respace theirs.

    Raises:
        FewstepError: for schedules without train indices, or more steps than these.
    """
    if not isinstance(schedule, VPSchedule):
        raise FewstepError(
            "DDPM's sampler is for variance-preserving schedules with train indices; sample a "
            f"{type(schedule).__name__} along its ODE (`sampler: ode`)."
        )
    if num_steps > schedule.num_train_timesteps:
        raise FewstepError(
            f"{num_steps} steps of DDPM's sampler are more than the "
            f"{schedule.num_train_timesteps} train indices there are."
        )
    visited = torch.linspace(schedule.t_max, 0, num_steps, dtype=torch.float64).round()
    return torch.cat([visited, torch.tensor([schedule.t_clean], dtype=torch.float64)])
