"""Displacements as shifts of a network's output, which any scheduler can work with.

A prediction ``(x0, eps)`` of a state ``x = alpha x0 + sigma eps`` can only move so that the state
stays: by ``(-sigma, alpha)`` times a *kick*, in variance-preserving coordinates. In these,

* a kick is a shift of the velocity ``alpha eps - sigma x0``;
* a deterministic first-order step (DDIM, Euler) to ``(alpha_s, sigma_s)`` moves by the kick times
  ``sigma_s alpha - alpha_s sigma``, minus the sine of the angle between the two levels;
* ``eps + lambda sigma g``, guidance in the form of a score, is the kick ``lambda sigma / alpha g``,
  which knows nothing of the step.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion import PredictionType, network_target
from fewstep.errors import FewstepError
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.steps import Step

SMALLEST_SINE = 1e-9


def sine(step: Step) -> float:
    """Of the angle from a step's start to its end; 0 for a step that stays in place."""
    return step.sigma * step.alpha_s - step.sigma_s * step.alpha


def moves(step: Step) -> bool:
    """Whether a step leads anywhere."""
    return sine(step) > SMALLEST_SINE


def kick_of_state(displacement: Tensor, step: Step) -> Tensor:
    """The kick whose deterministic first-order step subtracts ``displacement`` from the state."""
    return displacement / sine(step)


def kick_of_clean(displacement: Tensor, step: Step) -> Tensor:
    """The kick that subtracts ``displacement`` from the clean estimate, and keeps the state."""
    return displacement / step.sigma


def shift_of_output(kick: Tensor, step: Step, prediction_type: PredictionType) -> Tensor:
    """What a kick adds to a network's output, ``(B, ...)``."""
    return network_target(
        -step.sigma * kick,
        step.alpha * kick,
        kick.new_full((), step.alpha * step.scale),
        kick.new_full((), step.sigma * step.scale),
        prediction_type,
    )


def refuse_what_is_no_shift(guidance: Guidance) -> None:
    """Refuses guidance that does more than shift the prediction at a state.

    Raises:
        FewstepError: with all reasons.
    """
    wrong = []
    if guidance.clean is not None and guidance.clean_noise == "kept":
        wrong.append("clean with clean_noise: kept moves the state too (set clean_noise: matched)")
    if guidance.inner_steps:
        wrong.append("inner_steps move the state at a step's start")
    if guidance.recurrence.count > 1:
        wrong.append("recurrence takes a step again")
    if wrong:
        raise FewstepError(
            "Inside a pipeline, guidance can only shift what the network predicts: "
            f"{'; '.join(wrong)}. Leave these out, or use guided_sample."
        )
