"""One run of a diffusers pipeline whose network is guided, call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import Prediction, to_prediction
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.energies.pictures import the_tensor
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.layouts import Arguments, Layout
from fewstep.guidance.levels import SchedulerSteps
from fewstep.guidance.rounds import Guider
from fewstep.guidance.sampler import refuse_idle, refuse_what_cannot_be_guided
from fewstep.guidance.shifts import kick_of_clean, kick_of_state, moves, shift_of_output, sine
from fewstep.guidance.steps import Step
from fewstep.guidance.trace import Clock, Recorder


class PipelineRun:
    """What happens between a pipeline's ``set_timesteps`` and its result.

    Args:
        scheduler: the pipeline's, which has its times.
        layout: how the pipeline calls its network.
        guidance, target: see :func:`fewstep.guidance.pipelines.guide`.
        draws: gives the generators of smoothing and augmentation for so many samples.
        checkpointing: computes the network again in the backward pass.
        first: what the network is called with first.
        sample: the name of the state in it.

    Attributes:
        last: the latest guided estimate of clean samples, ``(N, ...)``.

    Raises:
        FewstepError: if the scheduler's levels are unknown, or no step of the run would be guided.
    """

    def __init__(
        self,
        scheduler: Any,
        layout: Layout,
        guidance: Guidance,
        target: Target,
        draws: Callable[[int], Sequence[torch.Generator]],
        checkpointing: bool,
        first: Arguments,
        sample: str,
    ) -> None:
        self.schedule, self.times = SchedulerSteps(scheduler), scheduler.timesteps
        self.layout, self.guidance, self.target = layout, guidance, target
        self.draws, self.checkpointing = draws, checkpointing
        self.streams: Sequence[torch.Generator] = []
        self.size = layout.size(first)
        self.recorder = Recorder(clock=Clock(first[sample].device))
        self.guider = Guider(guidance, target, self.recorder)
        self.pending: tuple[Tensor, Tensor] | None = None
        self.last: Tensor | None = None
        t = float(torch.as_tensor(first["timestep"]).flatten()[0]) * layout.time_unit
        self.number, self.calls = self.schedule.first(t), 0
        ahead = self.schedule.steps[self.schedule.at(self.number).index :]
        refuse_idle(guidance, [step for step in ahead if moves(step)])

    def called(self, scale: float) -> Step:
        """The step that the network is called for now.

        Args:
            scale: of classifier-free guidance, 1 for off.

        Raises:
            FewstepError: if the network was called more often than there are branches.
        """
        step = self.schedule.at(self.number)
        branches = 2 if self.layout.branches == "apart" and scale > 1 else 1
        self.calls += 1
        if self.calls > branches:
            raise FewstepError(
                f"The pipeline called its network again at t = {step.t:g}: it has a branch that "
                "guide() was not told of. For true classifier-free guidance of FLUX, give guide() "
                "the true_cfg_scale as guidance_scale."
            )
        if self.calls == 1:  # both branches count once
            self.recorder.denoiser_evaluations += 1
        return step

    def stepped(self) -> None:
        """The scheduler takes a step: what is called next is its next one's."""
        self.number, self.calls = self.number + 1, 0

    def guided(self, network: Callable[[Tensor], Any], x: Tensor, step: Step, scale: float) -> Any:
        """A guided call of the network; what it returns, with its output shifted.

        Args:
            network: of a state ``(B, ...)`` alone.
            x: the state, with both branches of classifier-free guidance twice as long as the batch.
            scale: of classifier-free guidance, 1 for off.
        """
        both = scale > 1 and self.layout.branches != "apart"
        x = x[: len(x) // 2] if both else x
        refuse_what_cannot_be_guided(x, self.target)
        through = self.guidance.state is not None
        with torch.set_grad_enabled(through):
            if self.pending is None:
                leaf = torch.zeros_like(x, dtype=work_dtype(x)).requires_grad_(through)
            else:
                leaf = self.pending[0]
            state = x.to(leaf.dtype) + step.scale * leaf  # the very same numbers
            given = state.to(x.dtype)
            output = self._evaluated(network, torch.cat([given, given]) if both else given)
            raw = the_tensor(output, None)
            predicted = raw[:, : x.shape[1]] if _has_variance(raw, x) else raw
            combined = self._combined(predicted.to(leaf.dtype), leaf, scale)
        if combined is None:
            return _with(output, raw.detach())
        kick = self._kick(*combined, state, leaf, step)
        shift = shift_of_output(kick, step, self.schedule.prediction_type)
        if both:
            shift = torch.cat([shift, shift])
        elif scale > 1:
            shift = shift / (1 - scale)
        moved = (predicted.detach() + shift).to(raw.dtype)
        rest = raw.detach()[:, moved.shape[1] :]
        return _with(output, torch.cat([moved, rest], 1) if rest.numel() else moved)

    def _evaluated(self, network: Callable[[Tensor], Any], state: Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(network, state, use_reentrant=False)
        return network(state)

    def _combined(
        self, predicted: Tensor, leaf: Tensor, scale: float
    ) -> tuple[Tensor, Tensor | None] | None:
        """Both branches in one, and the unconditional one if there is any, each ``(N, ...)``.

        None as long as one is missing.
        """
        if scale == 1:
            return predicted, None
        if self.layout.branches != "apart":
            first, second = predicted.chunk(2)
            null, cond = (second, first) if self.layout.branches == "reversed" else (first, second)
        elif self.pending is None:
            self.pending = (leaf, predicted)
            return None
        else:
            (_, cond), null, self.pending = self.pending, predicted, None
        return null + scale * (cond - null), null

    def _kick(
        self, output: Tensor, null: Tensor | None, state: Tensor, leaf: Tensor, step: Step
    ) -> Tensor:
        """How far the prediction moves (:mod:`fewstep.guidance.shifts`), ``(N, ...)``."""
        guidance = self.guidance
        with torch.set_grad_enabled(guidance.state is not None):
            seen = self._prediction(output, state, step)
            latents = self._unpacked(seen.x0)
        gap = self._gap(seen, null, state, step)
        self.streams = self.streams or self.draws(len(state))
        found = self.guider.moves(latents.detach(), step, self.streams)
        x0, eps, kick = seen.x0.detach(), seen.eps.detach(), torch.zeros_like(leaf)
        if guidance.state is not None:
            kick = kick_of_state(found.of_state(leaf, latents, eps, step, gap), step)
        if guidance.clean is not None:
            moved = found.of_clean(x0, eps, self._unpacked, gap)
            kick = kick + kick_of_clean(moved, step)
        found.note(sine(step) * kick)
        self.last = x0 - step.sigma * kick
        return kick

    def _prediction(self, output: Tensor, state: Tensor, step: Step) -> Prediction:
        """What the network's output says, as clean sample and noise."""
        alpha, sigma = (output.new_full((), step.scale * v) for v in (step.alpha, step.sigma))
        return to_prediction(output, state, alpha, sigma, self.schedule.prediction_type)

    @torch.no_grad()
    def _gap(
        self, seen: Prediction, null: Tensor | None, state: Tensor, step: Step
    ) -> Tensor | None:
        """What classifier-free guidance adds to the noise, where it is on and a rule asks."""
        if null is None or not self.guidance.needs_cfg_gap:
            return None
        return seen.eps - self._prediction(null, state, step).eps

    def _unpacked(self, x0: Tensor) -> Tensor:
        """What the energy sees, of an estimate as the network knows it."""
        return self.layout.unpacked(x0, self.size)


def _has_variance(output: Tensor, x: Tensor) -> bool:
    """Whether a network predicts a variance in as many channels again."""
    return x.ndim > 3 and output.shape[1] == 2 * x.shape[1]


def _with(output: Any, sample: Tensor) -> Any:
    """A network's outputs with another first one."""
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(sample=sample)
