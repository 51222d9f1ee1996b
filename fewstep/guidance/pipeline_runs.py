"""One run of a diffusers pipeline whose network is guided, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import to_prediction
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.energies.pictures import the_tensor
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.layouts import Layout
from fewstep.guidance.levels import SchedulerSteps
from fewstep.guidance.rounds import follow
from fewstep.guidance.rules import Signal
from fewstep.guidance.sampler import refuse_what_cannot_be_guided
from fewstep.guidance.shifts import kick_of_clean, kick_of_state, shift_of_output, sine
from fewstep.guidance.steps import Step
from fewstep.guidance.trace import Recorder
from fewstep.seeding import torch_generator


class PipelineRun:
    """What happens between a pipeline's ``set_timesteps`` and its result.

    Args:
        scheduler: the pipeline's, which has its times.
        layout: how the pipeline calls its network.
        guidance, target, seed: see :func:`fewstep.guidance.pipelines.guide`.
        checkpointing: computes the network again in the backward pass.

    Attributes:
        last: the latest guided estimate of clean samples, ``(N, ...)``.
    """

    def __init__(
        self,
        scheduler: Any,
        layout: Layout,
        guidance: Guidance,
        target: Target,
        seed: int,
        checkpointing: bool,
    ) -> None:
        self.schedule, self.times = SchedulerSteps(scheduler), scheduler.timesteps
        self.layout, self.guidance, self.target = layout, guidance, target
        self.seed, self.checkpointing = seed, checkpointing
        self.objective = guidance.objective
        self.state_rule = guidance.state.start() if guidance.state else None
        self.clean_rule = guidance.clean.start() if guidance.clean else None
        self.recorder = Recorder()
        self.draws: list[torch.Generator] = []
        self.pending: tuple[Tensor, Tensor] | None = None
        self.calls: dict[int, int] = {}
        self.last: Tensor | None = None

    def step_at(self, t: float, scale: float) -> Step:
        """The step a call of the network belongs to.

        Args:
            scale: of classifier-free guidance, 1 for off.

        Raises:
            FewstepError: if the network was called more often than there are branches.
        """
        step = self.schedule.at(t)
        branches = 2 if self.layout.branches == "apart" and scale > 1 else 1
        self.calls[step.index] = self.calls.get(step.index, 0) + 1
        if self.calls[step.index] > branches * self.schedule.visits[step.index]:
            raise FewstepError(
                f"The pipeline called its network again at t = {t:g}: it has a branch that guide() "
                "was not told of. For true classifier-free guidance of FLUX, give guide() the "
                "true_cfg_scale as guidance_scale."
            )
        if (self.calls[step.index] - 1) % branches == 0:  # both branches count once
            self.recorder.denoiser_evaluations += 1
        return step

    def guided(
        self,
        network: Callable[[Tensor], Any],
        x: Tensor,
        step: Step,
        scale: float,
        unpacked: Callable[[Tensor], Tensor],
    ) -> Any:
        """A guided call of the network; what it returns, with its output shifted.

        Args:
            network: of a state ``(B, ...)`` alone.
            x: the state, with both branches of classifier-free guidance twice as long as the batch.
            scale: of classifier-free guidance, 1 for off.
            unpacked: latents as the decoder knows them, of the network's.
        """
        both = scale > 1 and self.layout.branches != "apart"
        x = x[: len(x) // 2] if both else x
        refuse_what_cannot_be_guided(x, self.target)
        through = self.state_rule is not None
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
        kick = self._kick(combined, state, leaf, step, unpacked)
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

    def _combined(self, predicted: Tensor, leaf: Tensor, scale: float) -> Tensor | None:
        """Both branches in one, ``(N, ...)``; None as long as one is missing."""
        if scale == 1:
            return predicted
        if self.layout.branches != "apart":
            first, second = predicted.chunk(2)
            null, cond = (second, first) if self.layout.branches == "reversed" else (first, second)
        elif self.pending is None:
            self.pending = (leaf, predicted)
            return None
        else:
            (_, cond), null, self.pending = self.pending, predicted, None
        return null + scale * (cond - null)

    def _kick(
        self,
        output: Tensor,
        state: Tensor,
        leaf: Tensor,
        step: Step,
        unpacked: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """How far the prediction moves (:mod:`fewstep.guidance.shifts`), ``(N, ...)``."""
        with torch.set_grad_enabled(self.state_rule is not None):
            alpha, sigma = (output.new_tensor(step.scale * v) for v in (step.alpha, step.sigma))
            seen = to_prediction(output, state, alpha, sigma, self.schedule.prediction_type)
            latents = unpacked(seen.x0)
        if not self.draws:
            self.draws = [torch_generator(self.seed, "guidance", row) for row in range(len(state))]
        losses = self.objective.drawn(latents.detach(), self.target, step, self.draws)
        kick, noted = torch.zeros_like(leaf), list[Signal]()
        broken = torch.zeros(len(leaf), dtype=torch.bool, device=leaf.device)

        def follows(rule: Any, point: Tensor, at: Tensor) -> Tensor:
            nonlocal broken
            with torch.enable_grad():
                loss = losses(point)
            minimum, eps = self.guidance.energy.minimum, seen.eps.detach()
            signal, move, wrong = follow(rule, loss, at, eps, minimum, step)
            self.recorder.energy_evaluations += self.objective.views
            noted.append(signal)
            broken = broken | wrong
            return move

        if self.state_rule is not None:
            self.recorder.denoiser_gradients += 1
            kick = kick_of_state(follows(self.state_rule, latents, leaf), step)
        if self.clean_rule is not None:
            moved = torch.zeros_like(leaf)
            for _ in range(self.guidance.clean_iterations):
                point = (seen.x0.detach() - moved).requires_grad_(True)
                with torch.enable_grad():
                    there = unpacked(point)
                moved = moved + follows(self.clean_rule, there, point)
            kick = kick + kick_of_clean(moved, step)
        first = noted[0]
        self.recorder.note(step.t, first.loss, first.gradient, sine(step) * kick, broken)
        self.last = seen.x0.detach() - step.sigma * kick
        return kick


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
