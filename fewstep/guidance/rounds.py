"""One guided round: denoise, differentiate, step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import Cond, DenoiserLike, Prediction
from fewstep.diffusion.tables import expand_to
from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.rules import Displacement, Signal
from fewstep.guidance.steps import Step
from fewstep.guidance.trace import Recorder
from fewstep.seeding import Generators


def predict(
    denoiser: DenoiserLike, x: Tensor, step: Step, cond: Cond | None, checkpointing: bool
) -> Prediction:
    """A denoiser's prediction at a step's start, with a graph where gradients are on.

    Args:
        x: the state ``(B, ...)``; the denoiser's own is ``step.scale`` times as long.
        checkpointing: computes the denoiser again in the backward pass.
    """
    t = torch.full((len(x),), step.t, device=x.device, dtype=x.dtype)

    def denoise(state: Tensor) -> tuple[Tensor, Tensor]:
        prediction = denoiser(step.scale * state, t, cond)
        return prediction.x0, prediction.eps

    if checkpointing and torch.is_grad_enabled():
        return Prediction(*checkpoint(denoise, x, use_reentrant=False))
    return Prediction(*denoise(x))


def follow(
    rule: Displacement, loss: Tensor, leaf: Tensor, eps: Tensor, minimum: float, step: Step
) -> tuple[Signal, Tensor, Tensor]:
    """A rule's displacement from the gradient of losses.

    The losses are summed over the batch, so each sample's gradient is its own. What is not finite
    becomes zero: its sample is not guided this time.

    Args:
        loss: ``(B,)``, with a graph.
        leaf: what they are differentiated with respect to, ``(B, ...)``.
        eps: the predicted noise, ``(B, ...)``.
        minimum: the loss's lower bound.

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
    signal = Signal(gradient, torch.where(sound, loss.detach(), minimum), eps, minimum)
    move = rule(signal, step)
    sound = sound & move.flatten(1).isfinite().all(1)
    return signal, torch.where(expand_to(sound, move), move, 0.0), ~sound


class Walk:
    """One run of a guided sampler: what does not change from step to step.

    Args:
        denoiser, cond: as for any sampler.
        guidance: how it is guided.
        target: what the energy is told of each sample, ``(B, ...)``.
        generator: draws noise for smoothing and numbers for augmentation.
        checkpointing: computes the denoiser again in the backward pass instead of keeping its
            activations.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Cond | None,
        guidance: Guidance,
        target: Target,
        generator: Generators,
        checkpointing: bool,
    ) -> None:
        self.denoiser, self.cond = denoiser, cond
        self.guidance, self.objective = guidance, guidance.objective
        self.target, self.generator = target, generator
        self.checkpointing = checkpointing
        self.state_rule = guidance.state.start() if guidance.state else None
        self.clean_rule = guidance.clean.start() if guidance.clean else None
        self.recorder = Recorder()

    def round(self, x: Tensor, step: Step, z: Tensor | None) -> Tensor:
        """The state at the end of a step, ``(B, ...)``, from the one at its start.

        Args:
            z: fresh noise of the base step, if it draws any.
        """
        if not self.guidance.window.holds(step):
            _, seen = self._predict(x, step, through=False)
            return step.arrive(seen.x0, seen.eps, z)
        moves = _Moves(self, step, x)
        start = x
        for _ in range(self.guidance.inner_steps):
            state, seen = self._predict(x, step, through=True)
            x = x - moves.of_state(state, seen, step.in_place())
        shift = start - x
        through = self.state_rule is not None and not self.guidance.inner_steps
        state, seen = self._predict(x, step, through)
        arrived = step.arrive(seen.x0.detach(), seen.eps.detach(), z)
        if through:
            move = moves.of_state(state, seen, step)
            arrived, shift = arrived - move, shift + move
        if self.clean_rule is not None:
            move = self.guidance.clean_gain(step) * moves.of_clean(seen)
            arrived, shift = arrived - move, shift + move
        first = moves.signals[0]
        self.recorder.note(step.t, first.loss, first.gradient, shift, moves.broken)
        return arrived

    def _predict(self, x: Tensor, step: Step, through: bool) -> tuple[Tensor, Prediction]:
        """The state as a leaf, and the denoiser's prediction, with a graph if ``through``."""
        self.recorder.denoiser_evaluations += 1
        state = x.detach().requires_grad_(through)
        with torch.set_grad_enabled(through):
            return state, predict(self.denoiser, state, step, self.cond, self.checkpointing)


class _Moves:
    """The displacements of one round, which all see the same random numbers.

    Attributes:
        signals: what the rules saw, in order.
        broken: samples with something that was not finite, ``(B,)``.
    """

    def __init__(self, walk: Walk, step: Step, x: Tensor) -> None:
        self.walk, self.step = walk, step
        self.losses = walk.objective.drawn(x, walk.target, step, walk.generator)
        self.signals: list[Signal] = []
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def of_state(self, state: Tensor, seen: Prediction, step: Step) -> Tensor:
        """From the gradient through the denoiser, ``(B, ...)``."""
        rule = self.walk.state_rule
        assert rule is not None  # guidance with inner steps has one
        self.walk.recorder.denoiser_gradients += 1
        return self._move(rule, state, seen.x0, seen.eps.detach(), step)

    def of_clean(self, seen: Prediction) -> Tensor:
        """From gradients of the clean estimate alone, ``(B, ...)``, in its own units."""
        rule, point, eps = self.walk.clean_rule, seen.x0.detach(), seen.eps.detach()
        assert rule is not None
        moved = torch.zeros_like(point)
        for _ in range(self.walk.guidance.clean_iterations):
            leaf = (point - moved).requires_grad_(True)
            moved = moved + self._move(rule, leaf, leaf, eps, self.step)
        return moved

    def _move(
        self, rule: Displacement, leaf: Tensor, clean: Tensor, eps: Tensor, step: Step
    ) -> Tensor:
        """A rule's displacement from the gradient of ``losses(clean)`` with respect to ``leaf``."""
        with torch.enable_grad():
            loss = self.losses(clean)
        self.walk.recorder.energy_evaluations += self.walk.objective.views
        signal, move, broken = follow(
            rule, loss, leaf, eps, self.walk.guidance.energy.minimum, step
        )
        self.signals.append(signal)
        self.broken = self.broken | broken
        return move
