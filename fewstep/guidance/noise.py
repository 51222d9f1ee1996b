"""Optimising the initial noise of a few-step sampler through all of its jumps.

A student of one step leaves no room to guide along the way: its only choice is the noise it starts
from. The student itself is never asked for anything but what it was trained for, a sample from
Gaussian noise, as long as that noise still looks Gaussian: in many dimensions its length hardly
varies, so the search keeps to that shell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion import Cond, DenoiserLike
from fewstep.errors import FewstepError
from fewstep.guidance.augmentors import PLAIN, Augmentor
from fewstep.guidance.energies import Energy, Target
from fewstep.guidance.freezing import frozen
from fewstep.guidance.rounds import follow
from fewstep.guidance.rules import StepRule, safe_inverse, sample_norm
from fewstep.guidance.sampler import (
    GuidedSamples,
    own_stream,
    refuse_what_cannot_be_guided,
)
from fewstep.guidance.selection import Keeper
from fewstep.guidance.smoothing import Objective
from fewstep.guidance.steps import FINISHED, BaseStep
from fewstep.guidance.students import Chain
from fewstep.guidance.trace import LARGEST_MOVE, Clock, Recorder
from fewstep.seeding import Generators

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NoiseOptimisation:
    """How initial noise is improved.

    Args:
        energy: a loss of finished samples.
        rule: how far the noise moves; the predicted noise that some rules measure by is the noise
            itself. Rules that are a share of a step's length are refused.
        iterations: gradients of each sample. Each costs a forward and a backward pass through the
            whole chain; one more forward pass judges the last iterate.
        shell: where the noise is kept. ``own``: at the length it was drawn with, so that lengths
            stay exactly as Gaussian as they were; ``typical``: at ``sqrt(D)``; ``free``: nowhere.
        penalty: weight of minus the logarithm of the chi density of its length, which is 0 at the
            most likely length. For ``free`` noise.
        augmentor: random views of the finished sample; the best iterate is chosen by views that
            are the same in all iterations and that no gradient saw.
    """

    energy: Energy
    rule: StepRule
    iterations: int = 20
    shell: Literal["own", "typical", "free"] = "own"
    penalty: float = 0.0
    augmentor: Augmentor | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise FewstepError(
                f"Noise is optimised in 1 iteration or more, not {self.iterations}; for none, "
                "use plain_sample."
            )
        if self.penalty and self.shell != "free":
            raise FewstepError(
                f"A penalty on the noise's length does nothing with shell: {self.shell}, which "
                "fixes it. Set shell: free, or leave out the penalty."
            )

    def kept(self, noise: Tensor, first: Tensor) -> Tensor:
        """The noise ``(B, ...)`` on its shell, where ``first`` is what it was drawn as."""
        if self.shell == "free":
            return noise
        own = self.shell == "own"
        length = sample_norm(first) if own else first[0].numel() ** 0.5
        return noise * length * safe_inverse(sample_norm(noise), 0.0)


def chi_penalty(noise: Tensor) -> Tensor:
    """Minus the log-density of the length ``r`` of Gaussian noise ``(B, ...)``, ``(B,)``.

    ``r^2 / 2 - (D - 1) log r`` less its lowest value, at ``r^2 = D - 1``.
    """
    degrees = max(noise[0].numel() - 1, 0)
    square = noise.flatten(1).square().sum(1)
    if not degrees:
        return square / 2
    share = (square / degrees).clamp_min(torch.finfo(noise.dtype).tiny)
    return degrees / 2 * (share - 1 - share.log())


@dataclass(frozen=True)
class OptimisedNoise(GuidedSamples):
    """Samples from optimised noise.

    Attributes:
        noise: the initial noise they come from, ``(B, ...)``: any sampler can start from it.
        loss: what each sample's best iterate was chosen by, ``(B,)``.
        chosen: number of that iterate, 0 for the noise as drawn, ``(B,)``.
    """

    noise: Tensor
    loss: Tensor
    chosen: Tensor


@torch.no_grad()
def optimise_noise(
    denoiser: DenoiserLike,
    noise: Tensor,
    cond: Cond | None,
    times: Tensor,
    optimisation: NoiseOptimisation,
    target: Target = None,
    generator: Generators = None,
    base: BaseStep | None = None,
    checkpointing: bool = True,
    largest_move: float | None = LARGEST_MOVE,
) -> OptimisedNoise:
    """Samples from the noise that suits the energy best, of all that were tried for each sample.

    Noise that the base step draws on the way is drawn once and held fixed, so the sample is a
    function of its initial noise. A sample depends on no batch mate. The trace has a row for each
    iteration, all at the first of the times.

    Args:
        noise: where the search starts, ``(B, ...)``.
        times: along which the chain walks, ``(K + 1,)``.
        target: what the energy is told of each sample, ``(B, ...)``; for a sum of energies a
            mapping.
        generator: draws the noise of the base step.
        base: how a step is taken; deterministic by default.
        checkpointing: keeps the activations of one jump at a time instead of all.
        largest_move: see :meth:`fewstep.guidance.trace.Trace.check`; None leaves the check out.

    Raises:
        FewstepError: if the search diverged, or cannot be computed as asked.
    """
    refuse_what_cannot_be_guided(noise, target)
    chain = Chain.drawn(denoiser, noise, cond, times, generator, base, checkpointing)
    search = _Search(chain, optimisation, target, own_stream(generator), noise.device)
    with frozen(denoiser, optimisation.energy):
        search.run(chain.start(noise))
    samples, best = search.keeper.rows
    return OptimisedNoise(
        samples,
        search.recorder.close(samples, largest_move),
        best * chain.steps[0].scale,
        search.keeper.loss,
        search.keeper.chosen,
    )


class _Search:
    """One run of a noise optimisation."""

    def __init__(
        self,
        chain: Chain,
        optimisation: NoiseOptimisation,
        target: Target,
        generator: Generators,
        device: torch.device,
    ) -> None:
        self.chain, self.optimisation = chain, optimisation
        self.target, self.generator = target, generator
        self.objective = Objective(optimisation.energy, optimisation.augmentor or PLAIN)
        if not optimisation.rule.acts_at(chain.steps[0].in_place()):
            raise FewstepError(
                f"The rule {type(optimisation.rule).__name__} gives noise a step of no length: its "
                "weight is a share of the signal, and there is none. Take the weight constant, "
                "Normalised or Polyak."
            )
        self.rule = optimisation.rule.start()
        self.keeper = Keeper()
        self.recorder = Recorder(clock=Clock(device))

    def run(self, first: Tensor) -> None:
        """Offers the first state and that after each iteration to the keeper."""
        ruler = self._drawn(first) if self.objective.augmentor.numbers else None
        typical = self.optimisation.shell == "typical"
        state = self.optimisation.kept(first, first) if typical else first
        for _ in range(self.optimisation.iterations):
            state = self._iterate(state, first, ruler)
        samples = self.chain(state)
        self.recorder.denoiser_evaluations += len(self.chain.steps)
        loss = self._value(ruler or self._drawn(first), samples, state)
        self.keeper.offer(loss, samples, state)

    def _iterate(self, state: Tensor, first: Tensor, ruler: Loss | None) -> Tensor:
        """The next state, ``(B, ...)``; this one is offered."""
        leaf, jumps = state.detach().requires_grad_(True), len(self.chain.steps)
        with torch.enable_grad():
            samples = self.chain(leaf)
            loss = self._value(self._drawn(first), samples, leaf)
        self.recorder.denoiser_evaluations += jumps
        self.recorder.denoiser_gradients += jumps
        done = samples.detach()
        worth = loss if ruler is None else self._value(ruler, done, state)
        self.keeper.offer(worth, done, state)
        minimum, step = self.optimisation.energy.minimum, self.chain.steps[0].in_place()
        signal, move, broken = follow(self.rule, loss, leaf, state, minimum, step)
        moved = self.optimisation.kept(state - move, first)
        self.recorder.note(step.t, signal.loss, signal.gradient, state - moved, broken)
        return moved

    def _drawn(self, like: Tensor) -> Loss:
        """The energy in views that are drawn now."""
        return self.objective.drawn(like, self.target, FINISHED, self.generator)

    def _value(self, losses: Loss, samples: Tensor, state: Tensor) -> Tensor:
        """What is minimised, ``(B,)``."""
        self.recorder.energy_evaluations += self.objective.views
        loss, penalty = losses(samples), self.optimisation.penalty
        return loss + penalty * chi_penalty(state) if penalty else loss
