"""Published methods as configurations of one guided step.

Strengths are those of the sources named; all depend on the energy and on the number of steps, so
tune them for every task. With the base step each was published with: ``DDIM(1)`` for DPS, LGD-MC,
Universal Guidance and TFG; ``FixedShare(0.5)`` or ``DDIM(1)`` for FreeDoM, MPGD and Shen et al.
"""

from __future__ import annotations

from typing import Literal

from fewstep.guidance.augmentors import Augmentor
from fewstep.guidance.energies import Energy
from fewstep.guidance.guidance import ALWAYS, ONCE, Guidance, Recurrence, Window
from fewstep.guidance.rules import (
    Capped,
    FreeDoMCfg,
    FreeDoMRms,
    Normalised,
    Polyak,
    Scheduled,
    StepRule,
    Weight,
)
from fewstep.guidance.smoothing import Smoothing


def dps(energy: Energy, strength: float = 1.0) -> Guidance:
    """Diffusion posterior sampling (Chung et al. 2023).

    With the energy ``|A x0 - y|``, ``strength`` is the paper's step size up to a factor of 2 (it
    differentiates the square and divides by the norm).
    """
    return Guidance(energy, state=Scheduled(strength))


def lgd_mc(energy: Energy, strength: float = 1.0, copies: int = 10) -> Guidance:
    """Loss-guided diffusion with Monte-Carlo smoothing (Song et al. 2023).

    ``exp(-loss)`` is averaged over ``copies`` (10 in Shen et al. 2024) with noise of the
    diffusion's own level.
    """
    smoothing = Smoothing(scale=1.0, copies=copies)
    return Guidance(energy, state=Scheduled(strength), smoothing=smoothing)


def freedom(
    energy: Energy,
    strength: float = 0.2,
    rule: Literal["signal", "rms", "cfg"] = "signal",
    window: Window = ALWAYS,
    recurrence: Recurrence = ONCE,
) -> Guidance:
    """FreeDoM (Yu et al. 2023).

    Its released code uses the rule ``signal`` (strength times ``sqrt(abar)``) with 0.2 for
    segmentation and guidance off for t <= 200; with 20 for sketches, 100 for faces, off for
    t <= 100; ``rms`` with strength 1 for CLIP, repeated 10 times for t in [500, 800] on
    ImageNet; and ``cfg`` with 0.2 for the style of Stable Diffusion, where classifier-free
    guidance is on, a band in the middle of the steps is guided, and its steps are repeated 3 times.
    """
    rules: dict[str, StepRule] = {
        "signal": Scheduled(strength, "signal"),
        "rms": FreeDoMRms(strength),
        "cfg": FreeDoMCfg(strength),
    }
    return Guidance(energy, state=rules[rule], window=window, recurrence=recurrence)


def mpgd(
    energy: Energy,
    strength: float = 7.5,
    rule: Literal["rms", "linear"] = "rms",
    recurrence: Recurrence = ONCE,
) -> Guidance:
    """Manifold-preserving guidance without a projection (He et al. 2024).

    Its released code uses the rule ``rms`` for faces, with 17.5, 7.5 and 4 at 20, 50 and 100 steps,
    and ``linear`` for inverse problems. Needs no gradient of the denoiser.
    """
    clean = (
        Normalised(strength, "inverse_next_signal", "rms")
        if rule == "rms"
        else Scheduled(strength, "inverse_signal")
    )
    return Guidance(energy, clean=clean, recurrence=recurrence)


def universal(
    energy: Energy,
    forward: float = 1.0,
    backward: float = 0.0,
    iterations: int = 1,
    repeats: int = 1,
) -> Guidance:
    """Universal guidance (Bansal et al. 2023).

    Args:
        forward: ``c`` in ``eps + c sigma g``, the gradient through the denoiser; 0 is off.
        backward: step size of the gradient steps on the clean estimate; 0 is off.
        iterations: number of those.
        repeats: how often each step is taken (5 in Shen et al. 2024).
    """
    return Guidance(
        energy,
        state=Scheduled(forward, "score") if forward else None,
        clean=Scheduled(backward) if backward else None,
        clean_iterations=iterations,
        clean_noise="matched",
        recurrence=Recurrence(repeats),
    )


def tfg(
    energy: Energy,
    rho: float = 0.25,
    mu: float = 0.25,
    sigma: float = 0.001,
    iterations: int = 4,
    copies: int = 1,
    repeats: int = 1,
    schedule: Literal["increase", "decrease", "constant"] = "increase",
) -> Guidance:
    """Training-free guidance (Ye et al. 2024), with the released code's scaling.

    Args:
        rho: strength through the denoiser.
        mu: strength on the clean estimate.
        sigma: smoothing noise, relative to the diffusion's level. These three are the start of the
            paper's search for the best values, which doubles ``rho`` and ``mu``.
        iterations: gradient steps on the clean estimate.
        copies: noisy copies.
        repeats: how often each step is taken.
        schedule: of ``rho`` and ``mu`` over the steps.
    """
    weights: dict[str, Weight] = {
        "increase": "tfg_increase",
        "decrease": "tfg_decrease",
        "constant": "tfg_constant",
    }
    return Guidance(
        energy,
        state=Scheduled(rho, weights[schedule]) if rho else None,
        clean=Scheduled(mu, schedule) if mu else None,
        clean_iterations=iterations,
        smoothing=Smoothing(sigma, copies),
        recurrence=Recurrence(repeats),
    )


def augmented_polyak(
    energy: Energy,
    strength: float = 0.002,
    augmentor: Augmentor | None = None,
    gap: Literal["eps_norm", "loss"] = "eps_norm",
    cap: float | None = 0.1,
    window: Window = ALWAYS,
    recurrence: Recurrence = ONCE,
) -> Guidance:
    """Random augmentation, a Polyak-type step and time travel (Shen et al., NeurIPS 2024).

    Released strengths: 2 for segmentation (off for t <= 200), 0.002 for sketches (off for
    t <= 100), 0.001 for CLIP on faces; they do not combine the step with augmentation, as the
    paper's text does. ``cap=None`` is the step as published, which can diverge.
    """
    rule: StepRule = Polyak(strength, gap)
    return Guidance(
        energy,
        state=rule if cap is None else Capped(rule, cap),
        augmentor=augmentor,
        window=window,
        recurrence=recurrence,
    )
