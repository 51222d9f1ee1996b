"""A guided step as a sum of parts: what is minimised, where the gradient enters, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.errors import FewstepError
from fewstep.guidance.augmentors import PLAIN, Augmentor
from fewstep.guidance.energies import Energy
from fewstep.guidance.rules import StepRule
from fewstep.guidance.smoothing import SHARP, Objective, Smoothing
from fewstep.guidance.steps import Step


@dataclass(frozen=True)
class Window:
    """The steps whose time, in the network's own unit, is in ``(low, high]``.

    Args:
        low, high: for a diffusion model out of 0 to 999, for a flow model out of 0 to 1000.
        every: of the run's steps, only each so many-th, counted from its first.
    """

    low: float = -math.inf
    high: float = math.inf
    every: int = 1

    def __post_init__(self) -> None:
        if self.low >= self.high or self.every < 1:
            raise FewstepError(
                f"No step is in a window with low {self.low:g}, high {self.high:g} and every "
                f"{self.every}; low must be below high and every at least 1."
            )

    def holds(self, step: Step) -> bool:
        """Whether a step is in the window."""
        return self.low < step.t <= self.high and step.index % self.every == 0


ALWAYS = Window()
"""All steps."""


@dataclass(frozen=True)
class Recurrence:
    """Time travel: a step is taken ``count`` times, with the noise put back in between.

    Args:
        count: 1 is off.
        window: the steps that are repeated.
    """

    count: int = 1
    window: Window = ALWAYS

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FewstepError(f"A step is taken once or more; got count: {self.count}.")

    def rounds(self, step: Step) -> int:
        """How often a step is taken."""
        return self.count if self.window.holds(step) else 1


ONCE = Recurrence()
"""No time travel."""


@dataclass(frozen=True)
class Guidance:
    """What one guided step consists of.

    The state after a step is ``base step - state displacement - clean displacement``: the first
    from the gradient with respect to the noisy state, through the denoiser, the second from the
    gradient with respect to the clean estimate alone, which needs no backward pass through it.

    Args:
        energy: a loss of clean samples.
        state: step rule for the gradient with respect to the noisy state (DPS, FreeDoM); or none.
        clean: step rule for the gradient with respect to the clean estimate (MPGD); or none.
        clean_iterations: gradient steps on the clean estimate, one after another.
        clean_noise: when the clean estimate is moved, the predicted noise is either ``kept``
            (MPGD, TFG), or ``matched`` to the noisy state (Universal Guidance's backward part).
        inner_steps: 0 lets the state rule act at a step's end, as all published methods do. With
            ``k`` it moves the state ``k`` times at the step's start instead, before the step is
            taken: for samplers of so few steps that one gradient a step is too little.
        augmentor: random views of the clean estimate; or none.
        smoothing: Gaussian noise about it.
        window: the steps that are guided.
        recurrence: time travel, for guided and unguided steps alike.
    """

    energy: Energy
    state: StepRule | None = None
    clean: StepRule | None = None
    clean_iterations: int = 1
    clean_noise: Literal["kept", "matched"] = "kept"
    inner_steps: int = 0
    augmentor: Augmentor | None = None
    smoothing: Smoothing = SHARP
    window: Window = ALWAYS
    recurrence: Recurrence = ONCE

    def __post_init__(self) -> None:
        if self.state is None and self.clean is None:
            raise FewstepError(
                "Guidance without a step rule does nothing. Set state (a gradient through the "
                "denoiser), clean (a gradient of the clean estimate alone), or both."
            )
        if self.inner_steps and (self.state is None or self.inner_steps < 0):
            raise FewstepError(
                f"inner_steps: {self.inner_steps} repeats the step rule called state; set state, "
                "and a number of 0 or more."
            )
        if self.clean_iterations < 1:
            raise FewstepError(
                f"clean_iterations must be 1 or more, got {self.clean_iterations}; to guide "
                "through the denoiser only, leave out clean."
            )

    @property
    def objective(self) -> Objective:
        """What is differentiated."""
        return Objective(self.energy, self.augmentor or PLAIN, self.smoothing)

    @property
    def needs_cfg_gap(self) -> bool:
        """Whether a rule measures by what classifier-free guidance adds."""
        rules = (self.state, self.clean)
        return any(rule is not None and rule.needs_cfg_gap for rule in rules)

    def acts_at(self, step: Step) -> bool:
        """Whether its rules can move a sample at a guided step, whatever the gradient."""
        place = step.in_place() if self.inner_steps else step
        of_state = self.state is not None and self.state.acts_at(place)
        of_clean = self.clean is not None and self.clean.acts_at(step)
        return of_state or (of_clean and self.clean_gain(step) != 0)

    def clean_gain(self, step: Step) -> float:
        """How far the state moves, at the end of a step, with the clean estimate."""
        if self.clean_noise == "kept":
            return step.alpha_s
        return step.alpha_s * (1 - step.ratio * step.kept_std / step.sigma)
