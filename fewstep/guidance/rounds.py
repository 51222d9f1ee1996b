"""One guided round: denoise, differentiate, step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import Cond, DenoiserLike, Guided, Prediction
from fewstep.diffusion.tables import expand_to
from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.rules import Displacement, Signal
from fewstep.guidance.steps import Step
from fewstep.guidance.trace import Recorder
from fewstep.seeding import Generators


@dataclass(frozen=True)
class Estimate(Prediction):
    """A prediction, and what classifier-free guidance added to its noise.

    Attributes:
        cfg_gap: see :class:`fewstep.guidance.rules.Signal`; None where it was not asked for.
    """

    cfg_gap: Tensor | None = None


def predict(
    denoiser: DenoiserLike,
    x: Tensor,
    step: Step,
    cond: Cond | None,
    checkpointing: bool,
    with_gap: bool = False,
) -> Estimate:
    """A denoiser's prediction at a step's start, with a graph where gradients are on.

    Args:
        x: the state ``(B, ...)``; the denoiser's own is ``step.scale`` times as long.
        checkpointing: computes the denoiser again in the backward pass.
        with_gap: the estimate has its ``cfg_gap``, of a denoiser that is :class:`Guided`.
    """
    t = torch.full((len(x),), step.t, device=x.device, dtype=x.dtype)

    def denoise(state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gap = None
        if with_gap and isinstance(denoiser, Guided):
            prediction, gap = denoiser.with_gap(step.scale * state, t, cond)
        else:
            prediction = denoiser(step.scale * state, t, cond)
        return prediction.x0, prediction.eps, gap

    if checkpointing and torch.is_grad_enabled():
        return Estimate(*checkpoint(denoise, x, use_reentrant=False))
    return Estimate(*denoise(x))


def follow(
    rule: Displacement,
    loss: Tensor,
    leaf: Tensor,
    eps: Tensor,
    minimum: float | None,
    step: Step,
    cfg_gap: Tensor | None = None,
) -> tuple[Signal, Tensor, Tensor]:
    """A rule's displacement from the gradient of losses.

    The losses are summed over the batch, so each sample's gradient is its own. What is not finite
    becomes zero: its sample is not guided this time.

    Args:
        loss: ``(B,)``, with a graph.
        leaf: what they are differentiated with respect to, ``(B, ...)``.
        eps: the predicted noise, ``(B, ...)``.
        minimum: the loss's lower bound, if it is known.
        cfg_gap: see :class:`fewstep.guidance.rules.Signal`.

    Returns:
        What the rule saw, the displacement ``(B, ...)``, and for which samples something was not
        finite, ``(B,)``.

    Raises:
        FewstepError: if the loss has no gradient.
    """
    if not loss.requires_grad:
        raise FewstepError(
            "The loss does not depend on the sample in a way that can be differentiated. "
            "Look for no_grad or detach in the denoiser and the energy."
        )
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    sound = gradient.flatten(1).isfinite().all(1) & loss.isfinite()
    gradient = torch.where(expand_to(sound, gradient), gradient, 0.0)
    settled = torch.where(sound, loss.detach(), minimum or 0.0)
    signal = Signal(gradient, settled, eps, minimum, cfg_gap)
    move = rule(signal, step)
    sound = sound & move.flatten(1).isfinite().all(1)
    return signal, torch.where(expand_to(sound, move), move, 0.0), ~sound


class Guider:
    """What does not change from round to round: guidance, its rules' memory and the record.

    Args:
        guidance: how the run is guided.
        target: what the energy is told of each sample, ``(B, ...)``.
        recorder: what happens is noted there.
    """

    def __init__(self, guidance: Guidance, target: Target, recorder: Recorder) -> None:
        self.guidance, self.objective = guidance, guidance.objective
        self.target, self.recorder = target, recorder
        self.state_rule = guidance.state.start() if guidance.state else None
        self.clean_rule = guidance.clean.start() if guidance.clean else None

    def moves(self, like: Tensor, step: Step, generator: Generators) -> Moves:
        """A round's displacements, with random numbers that are drawn now.

        Args:
            like: any tensor shaped as what the energy sees, ``(B, ...)``.
        """
        return Moves(self, like, step, generator)


class Moves:
    """The displacements of one round, which all see the same random numbers.

    Attributes:
        signals: what the rules saw, in order.
        broken: samples with something that was not finite, ``(B,)``.
    """

    def __init__(self, guider: Guider, like: Tensor, step: Step, generator: Generators) -> None:
        self.guider, self.step = guider, step
        self.losses = guider.objective.drawn(like, guider.target, step, generator)
        self.signals: list[Signal] = []
        self.broken = torch.zeros(len(like), dtype=torch.bool, device=like.device)

    def of_state(
        self, leaf: Tensor, clean: Tensor, eps: Tensor, step: Step, cfg_gap: Tensor | None = None
    ) -> Tensor:
        """From the gradient through the denoiser, ``(B, ...)``.

        Args:
            leaf: what is differentiated with respect to.
            clean: what the energy sees, with a graph that begins there.
            eps: the predicted noise.
            step: as the rule is told it.
            cfg_gap: as the rule is told it.
        """
        rule = self.guider.state_rule
        assert rule is not None  # guidance with inner steps has one
        self.guider.recorder.denoiser_gradients += 1
        return self._move(rule, leaf, clean, eps, step, cfg_gap)

    def of_clean(
        self,
        x0: Tensor,
        eps: Tensor,
        seen: Callable[[Tensor], Tensor] | None = None,
        cfg_gap: Tensor | None = None,
    ) -> Tensor:
        """From gradients of the clean estimate ``(B, ...)`` alone, in its own units.

        Args:
            seen: what the energy sees of an estimate; the estimate itself by default.
            cfg_gap: as the rule is told it.
        """
        rule, moved = self.guider.clean_rule, torch.zeros_like(x0)
        assert rule is not None
        for _ in range(self.guider.guidance.clean_iterations):
            leaf = (x0 - moved).requires_grad_(True)
            with torch.enable_grad():
                clean = leaf if seen is None else seen(leaf)
            moved = moved + self._move(rule, leaf, clean, eps, self.step, cfg_gap)
        return moved

    def note(self, shift: Tensor) -> None:
        """Adds the round to the record, as one that subtracted ``shift (B, ...)`` in all."""
        first = self.signals[0]
        recorder = self.guider.recorder
        recorder.note(self.step.t, first.loss, first.gradient, shift, self.broken)

    def _move(
        self,
        rule: Displacement,
        leaf: Tensor,
        clean: Tensor,
        eps: Tensor,
        step: Step,
        cfg_gap: Tensor | None,
    ) -> Tensor:
        """A rule's displacement from the gradient of ``losses(clean)`` with respect to ``leaf``."""
        with torch.enable_grad():
            loss = self.losses(clean)
        self.guider.recorder.energy_evaluations += self.guider.objective.views
        minimum = self.guider.guidance.energy.minimum
        signal, move, broken = follow(rule, loss, leaf, eps, minimum, step, cfg_gap)
        self.signals.append(signal)
        self.broken = self.broken | broken
        return move


class Walk:
    """One run of a guided sampler: what does not change from step to step.

    Args:
        denoiser, cond: as for any sampler.
        guider: how it is guided.
        generator: draws noise for smoothing and numbers for augmentation.
        checkpointing: computes the denoiser again in the backward pass instead of keeping its
            activations.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Cond | None,
        guider: Guider,
        generator: Generators,
        checkpointing: bool,
    ) -> None:
        self.denoiser, self.cond = denoiser, cond
        self.guider, self.guidance = guider, guider.guidance
        self.generator, self.checkpointing = generator, checkpointing

    def round(self, x: Tensor, step: Step, z: Tensor | None) -> Tensor:
        """The state at the end of a step, ``(B, ...)``, from the one at its start.

        Args:
            z: fresh noise of the base step, if it draws any.
        """
        if not self.guidance.window.holds(step):
            _, seen = self._predict(x, step, through=False)
            return step.arrive(seen.x0, seen.eps, z)
        moves = self.guider.moves(x, step, self.generator)
        start = x
        for _ in range(self.guidance.inner_steps):
            state, seen = self._predict(x, step, through=True)
            eps, place = seen.eps.detach(), step.in_place()
            x = x - moves.of_state(state, seen.x0, eps, place, seen.cfg_gap)
        shift = start - x
        through = self.guidance.state is not None and not self.guidance.inner_steps
        state, seen = self._predict(x, step, through)
        x0, eps = seen.x0.detach(), seen.eps.detach()
        arrived = step.arrive(x0, eps, z)
        if through:
            move = moves.of_state(state, seen.x0, eps, step, seen.cfg_gap)
            arrived, shift = arrived - move, shift + move
        if self.guidance.clean is not None:
            clean = moves.of_clean(x0, eps, cfg_gap=seen.cfg_gap)
            move = self.guidance.clean_gain(step) * clean
            arrived, shift = arrived - move, shift + move
        moves.note(shift)
        return arrived

    def _predict(self, x: Tensor, step: Step, through: bool) -> tuple[Tensor, Estimate]:
        """The state as a leaf, and the denoiser's prediction, with a graph if ``through``."""
        self.guider.recorder.denoiser_evaluations += 1
        state, gap = x.detach().requires_grad_(through), self.guidance.needs_cfg_gap
        with torch.set_grad_enabled(through):
            return state, predict(self.denoiser, state, step, self.cond, self.checkpointing, gap)
