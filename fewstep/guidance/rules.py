"""Step rules: how far a gradient moves the state.

Each returns what is *subtracted*, ``(B, ...)``, from norms taken over one sample at a time. The
published codes take them over the whole batch, which ties samples to their batch mates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.tables import expand_to
from fewstep.errors import FewstepError
from fewstep.guidance.steps import Step

Weight = Literal[
    "constant",
    "signal",
    "inverse_signal",
    "inverse_next_signal",
    "increase",
    "decrease",
    "tfg_constant",
    "tfg_increase",
    "tfg_decrease",
    "score",
]


@dataclass(frozen=True)
class Signal:
    """What a step rule sees.

    Attributes:
        gradient: of the loss, ``(B, ...)``.
        loss: ``(B,)``.
        eps: the predicted noise, ``(B, ...)``.
        minimum: the loss's lower bound; None where it is not known.
        cfg_gap: what classifier-free guidance of scale ``w`` adds to the predicted noise,
            ``w (eps_cond - eps_uncond)``, ``(B, ...)``; None where it is off, or where the run's
            rules do not ask for it (:attr:`StepRule.needs_cfg_gap`).
    """

    gradient: Tensor
    loss: Tensor
    eps: Tensor
    minimum: float | None = 0.0
    cfg_gap: Tensor | None = None


Displacement = Callable[[Signal, Step], Tensor]


class StepRule(ABC):
    """Turns a gradient into a displacement."""

    @abstractmethod
    def displacement(self, signal: Signal, step: Step) -> Tensor:
        """What to subtract from the state, ``(B, ...)``."""

    def start(self) -> Displacement:
        """The rule for one run; rules with a memory begin a new one."""
        return self.displacement

    def acts_at(self, step: Step) -> bool:
        """Whether it can move a sample at a step, if its strength is not zero."""
        return True

    @property
    def needs_cfg_gap(self) -> bool:
        """Whether it measures by :attr:`Signal.cfg_gap`."""
        return False


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to multiply ``x (B, ...)``."""
    return expand_to(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


def safe_inverse(x: Tensor, floor: float) -> Tensor:
    """``1 / x`` where ``x > floor``, else 0: a vanished gradient gives no step."""
    return torch.where(x > floor, 1 / x.clamp_min(max(floor, torch.finfo(x.dtype).tiny)), 0.0)


def weight_at(weight: Weight, step: Step) -> float:
    """A weight's value at a step.

    ``signal`` is FreeDoM's ``sqrt(abar_t)``; ``inverse_signal`` and ``inverse_next_signal`` are
    MPGD's; ``increase`` and ``decrease`` are TFG's, and with the prefix ``tfg_`` they are divided
    by ``sqrt(a_t)``, as TFG does for its gradient with respect to the noisy state. ``score`` moves
    the state as adding ``sigma g`` to the predicted noise would (Universal Guidance's forward
    part). With strength 1 and an exact ``-log p(y | x_t)`` for a loss it samples the posterior.
    """
    if weight == "inverse_signal":
        return step.divide(1.0, step.alpha)
    if weight == "inverse_next_signal":
        return step.divide(1.0, step.alpha_s)
    if weight == "score":
        step.must_move("score")
        return step.sigma * (step.divide(step.sigma, step.ratio) - step.kept_std)
    plain = {
        "constant": 1.0,
        "signal": step.alpha,
        "increase": step.increase,
        "decrease": step.decrease,
    }[weight.removeprefix("tfg_")]
    return step.divide(plain, step.ratio) if weight.startswith("tfg_") else plain


@dataclass(frozen=True)
class Scheduled(StepRule):
    """``strength * weight(t) * g``: DPS, LGD-MC, FreeDoM, Universal Guidance, TFG and MPGD."""

    strength: float
    weight: Weight = "constant"

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        return self.strength * weight_at(self.weight, step) * signal.gradient

    def acts_at(self, step: Step) -> bool:
        return weight_at(self.weight, step) != 0


@dataclass(frozen=True)
class Normalised(StepRule):
    """``strength * weight(t) * g / |g|``, which does not depend on the loss's scale.

    Args:
        measure: what ``|g|`` is: the Euclidean ``norm``, or the root mean square ``rms``.
        floor: gradients shorter than this give no step. The published codes have none, so that a
            loss which is all but at its lowest still gets a step of full length: for constraints
            that can be satisfied, such as an obstacle kept clear of, take 1e-6.
    """

    strength: float
    weight: Weight = "constant"
    measure: Literal["norm", "rms"] = "norm"
    floor: float = 0.0

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        gradient = signal.gradient
        length = math.sqrt(gradient[0].numel()) if self.measure == "rms" else 1.0
        factor = self.strength * weight_at(self.weight, step) * length
        return factor * safe_inverse(sample_norm(gradient), self.floor) * gradient

    def acts_at(self, step: Step) -> bool:
        return weight_at(self.weight, step) != 0


@dataclass(frozen=True)
class FreeDoMRms(StepRule):
    """The rule of FreeDoM's released CLIP runs, also used by Shen et al. on ImageNet (strength 2).

    ``0.02 strength rms(eps) (sigma / alpha) c1 / rms(g) * g`` with ``c1`` the weight of the clean
    estimate in the DDPM posterior.
    """

    strength: float = 1.0

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        step.must_move("FreeDoMRms")
        c1 = step.alpha_s * (1 - step.ratio**2) / step.sigma**2
        factor = 0.02 * self.strength * c1 * step.divide(step.sigma, step.alpha)
        inverse = safe_inverse(sample_norm(signal.gradient), 0.0)
        return factor * sample_norm(signal.eps) * inverse * signal.gradient


@dataclass(frozen=True)
class FreeDoMCfg(StepRule):
    """The rule of FreeDoM's release for Stable Diffusion (style), on top of classifier-free
    guidance of scale ``w``: ``strength w rms(eps_cond - eps_uncond) / rms(g) * g``.

    Args:
        strength: 0.2 in the release.
    """

    strength: float = 0.2

    @property
    def needs_cfg_gap(self) -> bool:
        return True

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        if signal.cfg_gap is None:
            raise FewstepError(
                "The rule FreeDoMCfg measures its step by what classifier-free guidance adds to "
                "the prediction, and there is none here. Sample with a condition and a scale above "
                "1 (steering.unconditional: false with sampling_guidance, Guided(denoiser, scale), "
                "or the pipeline's guidance_scale), or take FreeDoMRms."
            )
        inverse = safe_inverse(sample_norm(signal.gradient), 0.0)
        return self.strength * sample_norm(signal.cfg_gap) * inverse * signal.gradient


@dataclass(frozen=True)
class Polyak(StepRule):
    """``strength * gap / |g|^2 * g``.

    Args:
        gap: ``loss`` is the genuine Polyak step, whose gap is the loss above its minimum, and
            which does not depend on the loss's scale. ``eps_norm`` is the step of Shen et al.
            (NeurIPS 2024, algorithm 2), whose gap is ``|eps|``: its length ``|eps| / |g|`` has no
            bound as the gradient vanishes, so use it within :class:`Capped`.
        floor: gradients shorter than this give no step.
    """

    strength: float = 1.0
    gap: Literal["loss", "eps_norm"] = "loss"
    floor: float = 1e-6

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        gradient = signal.gradient
        if self.gap == "loss":
            if signal.minimum is None:
                raise FewstepError(
                    "The genuine Polyak step needs the loss's lower bound, and the energy has "
                    "none. Give the energy its minimum (a Reward can have a goal instead), or take "
                    "another rule, such as Normalised."
                )
            gap = expand_to((signal.loss - signal.minimum).clamp_min(0), gradient)
        else:
            gap = sample_norm(signal.eps)
        inverse = safe_inverse(sample_norm(gradient), self.floor)
        return self.strength * gap * inverse.square() * gradient


@dataclass(frozen=True)
class AdamMoments(StepRule):
    """Moments of the gradient over the steps of one run, as in Adam.

    Args:
        beta1, beta2, delta: as in Adam; the defaults are Adam's.
    """

    strength: float
    beta1: float = 0.9
    beta2: float = 0.999
    delta: float = 1e-8

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        """The first step of a run."""
        return self.start()(signal, step)

    def start(self) -> Displacement:
        return _Moments(self)


class _Moments:
    """One run's memory of :class:`AdamMoments`."""

    def __init__(self, rule: AdamMoments) -> None:
        self.rule = rule
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def __call__(self, signal: Signal, step: Step) -> Tensor:
        rule, g = self.rule, signal.gradient
        self.count += 1
        self.first = rule.beta1 * self.first + (1 - rule.beta1) * g
        self.second = rule.beta2 * self.second + (1 - rule.beta2) * g.square()
        mean = self.first / (1 - rule.beta1**self.count)
        square = self.second / (1 - rule.beta2**self.count)
        return rule.strength * mean / (square.sqrt() + rule.delta)


@dataclass(frozen=True)
class Capped(StepRule):
    """Another rule within a trust region: each sample moves by at most
    ``radius * sigma_s * sqrt(D)``, a share of the length of the noise that is left.

    A last step that ends at clean data has no noise left and so is not moved.

    Args:
        radius: 0.05 to 0.2 for many steps. In few, where each has a longer way to go, larger ones
            can serve; near 1 it is no bound but the length of the step.
    """

    rule: StepRule
    radius: float = 0.1

    @property
    def needs_cfg_gap(self) -> bool:
        return self.rule.needs_cfg_gap

    def acts_at(self, step: Step) -> bool:
        return step.sigma_s > 0 and self.rule.acts_at(step)

    def displacement(self, signal: Signal, step: Step) -> Tensor:
        return self._within(self.rule.displacement(signal, step), step)

    def start(self) -> Displacement:
        inner = self.rule.start()
        return lambda signal, step: self._within(inner(signal, step), step)

    def _within(self, displacement: Tensor, step: Step) -> Tensor:
        limit = self.radius * step.sigma_s * math.sqrt(displacement[0].numel())
        return displacement * (limit * safe_inverse(sample_norm(displacement), 0.0)).clamp_max(1)
