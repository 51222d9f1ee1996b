"""Teachers with a closed form: the ground truth that losses, solvers and samplers are tested on.

Every path ``x = alpha x0 + sigma eps`` is a rescaling of the circle ``x = cos(a) x0 + sin(a) eps``,
so closed forms are stated in ``(alpha, sigma)`` and hold for every schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Cond
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.diffusion.tables import expand_to

Levels = tuple[Tensor, Tensor]


class GaussianMixture:
    """A mixture of isotropic Gaussians in ``D`` dimensions with exact denoising.

    One component makes the single-Gaussian teacher.

    Args:
        means: component means, ``(K, D)``.
        stds: component standard deviations, ``(K,)``.
        weights: component weights, ``(K,)``; uniform by default.
        labels: class of each component, ``(K,)``, for conditional denoising; the component's
            index by default.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        count = means.shape[0]
        self.means = means
        self.stds = stds
        self.weights = torch.full_like(stds, 1 / count) if weights is None else weights
        self.labels = torch.arange(count) if labels is None else labels

    @property
    def num_classes(self) -> int:
        """Number of classes; the label ``num_classes`` stands for "no condition"."""
        return int(self.labels.max()) + 1

    def to(self, reference: Tensor) -> GaussianMixture:
        """The same mixture on another tensor's device and dtype."""
        return GaussianMixture(
            self.means.to(reference),
            self.stds.to(reference),
            self.weights.to(reference),
            self.labels.to(reference.device),
        )

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws ``(count, D)`` samples and their class labels ``(count,)``."""
        component = torch.multinomial(
            self.weights.float(), count, replacement=True, generator=generator
        )
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        samples = self.means[component] + self.stds[component, None] * noise
        return samples, self.labels[component]

    def predict(self, x: Tensor, levels: Levels, labels: Tensor | None = None) -> Prediction:
        """Exact posterior means ``E[x0 | x]`` and ``E[eps | x]``.

        Args:
            x: noisy samples ``(B, D)``.
            levels: ``alpha`` and ``sigma``, each ``(B, 1)`` or scalar tensors.
            labels: condition on a class each, ``(B,)``; ``num_classes`` means none.
        """
        alpha, sigma = (level.reshape(-1, 1) for level in levels)
        variance = (alpha * self.stds).square() + sigma.square()  # (B, K)
        offset = x[:, None, :] - alpha[:, :, None] * self.means  # (B, K, D)
        dim = x.shape[1]
        log_density = -0.5 * (offset.square().sum(-1) / variance + dim * variance.log())
        log_weights = self.weights.log().expand_as(log_density)
        if labels is not None:
            other = (labels[:, None] != self.labels) & (labels[:, None] < self.num_classes)
            log_weights = log_weights.masked_fill(other, -math.inf)
        responsibility = (log_density + log_weights).softmax(-1)
        slope = responsibility / variance
        x0 = responsibility @ self.means + (
            (alpha * self.stds.square() * slope)[..., None] * offset
        ).sum(1)
        eps = sigma * (slope[..., None] * offset).sum(1)
        return Prediction(x0, eps)

    def flow(self, x: Tensor, start: Levels, end: Levels, num_steps: int = 400) -> Tensor:
        """The probability-flow map from ``start`` to ``end`` levels, ``(B, D)``.

        Exact for one component; otherwise classical Runge-Kutta on the circle, where the velocity
        ``cos(a) eps - sin(a) x0`` is bounded even at pure noise.
        """
        if len(self.means) == 1:
            return self._gaussian_flow(x, start, end)
        first, last = (torch.atan2(level[1], level[0]) for level in (start, end))
        y = x / torch.hypot(*start)
        step = (last - first) / num_steps
        for index in range(num_steps):
            angle = first + index * step
            k1 = self._velocity(y, angle)
            k2 = self._velocity(y + 0.5 * step * k1, angle + 0.5 * step)
            k3 = self._velocity(y + 0.5 * step * k2, angle + 0.5 * step)
            k4 = self._velocity(y + step * k3, angle + step)
            y = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y * torch.hypot(*end)

    def _velocity(self, y: Tensor, angle: Tensor) -> Tensor:
        prediction = self.predict(y, (angle.cos(), angle.sin()))
        cos, sin = angle.cos().reshape(-1, 1), angle.sin().reshape(-1, 1)
        return cos * prediction.eps - sin * prediction.x0

    def _gaussian_flow(self, x: Tensor, start: Levels, end: Levels) -> Tensor:
        """``x_s = alpha_s m + (x_t - alpha_t m) sqrt(V_s / V_t)``; ``V = alpha^2 c^2 + sigma^2``"""
        mean, std = self.means[0], self.stds[0]
        v_start, v_end = ((a * std).square() + s.square() for a, s in (start, end))
        return end[0] * mean + (x - start[0] * mean) * (v_end / v_start).sqrt()

    def cdf(self, x: Tensor, levels: Levels) -> Tensor:
        """Cumulative distribution of the noisy marginal in one dimension, ``(B,)``."""
        alpha, sigma = (level.reshape(-1, 1) for level in levels)
        std = ((alpha * self.stds).square() + sigma.square()).sqrt()
        z = (x[:, None] - alpha * self.means[:, 0]) / std
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def quantile_flow(self, x: Tensor, start: Levels, end: Levels) -> Tensor:
        """The exact one-dimensional flow map ``CDF_end^-1(CDF_start(x))``, ``(B,)``, by bisection.

        In one dimension the probability flow is monotone and keeps mass, so it is this transform.
        """
        mass = self.cdf(x, start)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(100):
            middle = 0.5 * (low + high)
            below = self.cdf(middle, end) < mass
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)


class AnalyticDenoiser:
    """A Gaussian mixture as a denoiser: the optimal network, without training.

    Args:
        mixture: the data distribution.
        schedule: any schedule.
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule) -> None:
        self.mixture = mixture
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        labels = cond["class_labels"] if cond else None
        levels = self.schedule.levels(t, x_t)
        return self.mixture.predict(x_t, levels, labels)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor, num_steps: int = 400) -> Tensor:
        """The true map of the probability-flow ODE from ``t`` to ``s``, both ``(B,)``."""
        start, end = (
            (expand_to(a, x_t), expand_to(b, x_t))
            for a, b in (self.schedule.levels(t, x_t), self.schedule.levels(s, x_t))
        )
        return self.mixture.flow(x_t, start, end, num_steps)
