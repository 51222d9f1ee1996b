"""Noise schedules: ``x_t = alpha(t) x_0 + sigma(t) eps``, and the jump built on them.

Times are float tensors ``(B,)`` in the network's own unit: the train index ``0 .. 999`` for
variance-preserving models, ``1000 sigma`` for rectified flow. Everything that differs between
model families in the mathematics is here and in :mod:`fewstep.diffusion.prediction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.tables import Table, expand_to, work_dtype
from fewstep.errors import FewstepError

TrajectoryEnd = Literal["first_index", "clean"]


class Schedule(ABC):
    """Signal and noise levels over time.

    Attributes:
        t_max: time of pure noise, where sampling starts.
        t_min: time where trajectories end.
        t_clean: time of clean data; ``t_min`` or below it.
        config: the plain constructor arguments (see :mod:`fewstep.spec`).
    """

    t_max: float
    t_min: float
    t_clean: float
    config: dict[str, Any]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level at ``t (B,)``, float64 where the device has it."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at ``t (B,)``, float64 where the device has it."""

    @abstractmethod
    def grid_times(self, num_points: int) -> Tensor:
        """The ``num_points`` ascending solver times of PCM's spec, float64, ending at ``t_max``.

        Raises:
            FewstepError: if the schedule cannot be divided into that many points.
        """

    @abstractmethod
    def spaced_times(self, num_steps: int) -> Tensor:
        """``num_steps + 1`` descending times from ``t_max`` to ``t_min`` ("trailing" spacing)."""

    @abstractmethod
    def sample_times(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws training times on the generator's device."""

    @abstractmethod
    def time_between(self, low: Tensor, high: Tensor, position: Tensor) -> Tensor:
        """Maps ``position (B,)`` in [0, 1) to a time the network knows in ``[low, high]``."""

    def levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha(t)`` and ``sigma(t)`` shaped and typed to multiply ``x (B, ...)``."""
        dtype = work_dtype(x)
        return expand_to(self.alpha(t).to(dtype), x), expand_to(self.sigma(t).to(dtype), x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process: ``alpha(t) x0 + sigma(t) noise``, all ``(B, ...)``."""
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * noise

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """Moves to time ``s (B,)`` along the straight line a prediction describes.

        ``alpha(s) x0 + sigma(s) eps`` is the DDIM step, the flow-matching Euler step, the
        consistency function (``s = t_min``) and PCM's phased consistency function (``s`` the
        phase's edge; PCM eq. 3). ``jump(prediction at t, t) = x_t``: the boundary condition
        holds by construction.
        """
        alpha, sigma = self.levels(s, prediction.x0)
        return alpha * prediction.x0 + sigma * prediction.eps

    def jump_length(self, t: Tensor, s: Tensor) -> Tensor:
        """How far a jump ``t -> s`` moves for a unit error of the predicted velocity, ``(B,)``.

        ``alpha_s sigma_t - sigma_s alpha_t``: the angle's sine for variance-preserving schedules,
        ``sigma_t - sigma_s`` for flow matching. A jump's error divided by it is an error of the
        mean velocity, which has the same scale at every time.
        """
        return self.alpha(s) * self.sigma(t) - self.sigma(s) * self.alpha(t)

    def renoise(self, x_s: Tensor, s: Tensor, a: Tensor, noise: Tensor) -> Tensor:
        """Draws from the forward kernel ``q(x_a | x_s)`` for ``a >= s``.

        ``x_a = k x_s + sqrt(sigma_a^2 - k^2 sigma_s^2) noise`` with ``k = alpha_a / alpha_s``:
        the variance-correct kernel for every schedule. (The released flow-matching code of PCM
        uses ``(sigma_a - sigma_s) / (1 - sigma_s)`` as the standard deviation, which is too
        small for fresh noise.)
        """
        dtype = work_dtype(x_s)
        sigma_s, sigma_a = self.sigma(s), self.sigma(a)
        scale = self.alpha(a) / self.alpha(s)
        std = (sigma_a.square() - (scale * sigma_s).square()).clamp_min(0).sqrt()
        return expand_to(scale.to(dtype), x_s) * x_s + expand_to(std.to(dtype), x_s) * noise


class VPSchedule(Schedule):
    """Variance-preserving schedule of a discrete diffusion model (``alpha^2 + sigma^2 = 1``).

    Levels come from the betas of a diffusers scheduler. Between two train indices the angle
    ``atan2(sigma, alpha)`` is interpolated, so fractional times stay variance preserving.

    Args:
        beta_schedule, beta_start, beta_end, trained_betas, rescale_betas_zero_snr,
        num_train_timesteps: as in ``diffusers.DDIMScheduler``; the defaults are Stable Diffusion's.
        trajectory_end: ``first_index`` ends at train index 0, as released pipelines do
            (``set_alpha_to_one=False``); ``clean`` ends at clean data, kept at time -1.
    """

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        trajectory_end: TrajectoryEnd = "first_index",
    ) -> None:
        self.config = {
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "num_train_timesteps": num_train_timesteps,
            "trained_betas": trained_betas,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
            "trajectory_end": trajectory_end,
        }
        scheduler_config = {k: v for k, v in self.config.items() if k != "trajectory_end"}
        alpha_bar = DDIMScheduler(**scheduler_config).alphas_cumprod.double().clamp(0.0, 1.0)
        angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())
        # One entry in front for time -1: clean data has angle 0.
        self._angles = Table(torch.cat([torch.zeros(1, dtype=torch.float64), angle]))
        self.num_train_timesteps = num_train_timesteps
        self.t_max = float(num_train_timesteps - 1)
        self.t_clean = -1.0
        self.t_min = 0.0 if trajectory_end == "first_index" else self.t_clean

    @classmethod
    def from_diffusers(
        cls, scheduler: SchedulerMixin, trajectory_end: TrajectoryEnd = "first_index"
    ) -> VPSchedule:
        """The schedule a diffusers scheduler was trained with, from its betas."""
        known = set(cls().config) - {"trajectory_end"}
        config = {k: v for k, v in dict(scheduler.config).items() if k in known}
        if config.get("trained_betas") is not None:
            config["trained_betas"] = [float(b) for b in config["trained_betas"]]
        return cls(**config, trajectory_end=trajectory_end)

    def _angle(self, t: Tensor) -> Tensor:
        angles = self._angles.on(t.device)
        position = (t.to(angles.dtype) + 1).clamp(0, self.num_train_timesteps)
        below = position.floor().clamp_max(self.num_train_timesteps - 1)
        index = below.long()
        return torch.lerp(angles[index], angles[index + 1], position - below)

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t).sin()

    def grid_times(self, num_points: int) -> Tensor:
        total = self.num_train_timesteps
        if num_points < 1 or total % num_points:
            raise FewstepError(
                f"A grid of {num_points} solver points does not divide {total} train steps, so "
                f"training would never see t = {total - 1}. "
                f"Choose num_grid_points from {_divisors(total)}."
            )
        stride = total // num_points
        return torch.arange(1, num_points + 1, dtype=torch.float64) * stride - 1

    def spaced_times(self, num_steps: int) -> Tensor:
        total = self.num_train_timesteps
        fractions = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        return torch.cat([(fractions * total).round() - 1, torch.tensor([self.t_min]).double()])

    def sample_times(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        draws = torch.randint(
            self.num_train_timesteps, shape, generator=generator, device=generator.device
        )
        return draws.float()

    def time_between(self, low: Tensor, high: Tensor, position: Tensor) -> Tensor:
        low = low.clamp_min(0)  # clean data has no train index
        return (low + position * (high - low + 1)).floor().clamp_max(high)


class FlowSchedule(Schedule):
    """Rectified flow: ``x_t = (1 - sigma) x_0 + sigma eps`` with ``t = 1000 sigma``.

    Args:
        shift: timestep shift of SD3 (Esser et al. 2024): ``sigma = s u / (1 + (s - 1) u)``. It
            moves grids and training times, not the relation between ``t`` and ``sigma``.
        time_distribution: law of ``u`` in training, uniform or logit-normal(0, 1).
        trajectory_end: ``clean`` ends at sigma 0; ``first_index`` at the first entry of diffusers'
            1000-point table, as the released PCM code does.
    """

    num_train_timesteps = 1000

    def __init__(
        self,
        shift: float = 1.0,
        time_distribution: Literal["uniform", "logit_normal"] = "uniform",
        trajectory_end: TrajectoryEnd = "clean",
    ) -> None:
        if shift <= 0:
            raise FewstepError(f"A flow schedule's shift must be positive, got {shift}.")
        self.config = {
            "shift": shift,
            "time_distribution": time_distribution,
            "trajectory_end": trajectory_end,
        }
        self.shift = shift
        self.time_distribution = time_distribution
        self.t_max = 1000.0
        first = self._shifted(torch.tensor(1e-3, dtype=torch.float64))
        self.t_clean = 0.0
        self.t_min = self.t_clean if trajectory_end == "clean" else 1000.0 * float(first)

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.to(torch.float32 if t.device.type == "mps" else torch.float64) / 1000

    def grid_times(self, num_points: int) -> Tensor:
        if num_points < 1:
            raise FewstepError(f"A grid needs at least one point, got {num_points}.")
        return 1000 * self._shifted(
            torch.arange(1, num_points + 1, dtype=torch.float64) / num_points
        )

    def spaced_times(self, num_steps: int) -> Tensor:
        return torch.cat([self.grid_times(num_steps).flip(0), torch.tensor([self.t_min]).double()])

    def sample_times(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.time_distribution == "uniform":
            u = torch.rand(shape, generator=generator, device=generator.device)
        else:
            u = torch.randn(shape, generator=generator, device=generator.device).sigmoid()
        return 1000 * self._shifted(u)

    def time_between(self, low: Tensor, high: Tensor, position: Tensor) -> Tensor:
        return low + position * (high - low)


def _divisors(total: int) -> list[int]:
    return [n for n in range(1, total + 1) if total % n == 0]
