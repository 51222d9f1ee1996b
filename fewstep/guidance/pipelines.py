"""Guidance of plain diffusers pipelines, whatever their scheduler.

``with guide(pipe, guidance, target) as guided: pipe(...)``, and then ``guided.trace``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.energies import Decoded, Target
from fewstep.guidance.freezing import frozen
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.layouts import Layout, layout_of, scale_now
from fewstep.guidance.pipeline_runs import PipelineRun
from fewstep.guidance.shifts import moves, refuse_what_is_no_shift
from fewstep.guidance.trace import LARGEST_MOVE, Trace
from fewstep.networks.latents import LatentCodec


@contextmanager
def guide(
    pipe: Any,
    guidance: Guidance,
    target: Target = None,
    *,
    guidance_scale: float | None = None,
    decode: bool = True,
    checkpointing: bool = False,
    seed: int = 0,
    largest_move: float | None = LARGEST_MOVE,
) -> Iterator[GuidedPipeline]:
    """Guides all runs of a diffusers pipeline within a ``with`` block.

    The network's output is shifted, so that every scheduler can be used and nothing else of the
    pipeline changes: by ``lambda sigma g`` in units of noise for ``Scheduled(lambda, "score")``,
    the gradient of the guided loss as a score, and for other rules so that a deterministic
    first-order step (DDIM without eta, Euler) moves the state as the rule says. Solvers of higher
    order or with fresh noise see the same shift. Gradients are turned on here, under the
    pipeline's own ``no_grad``.

    With classifier-free guidance the loss is that of the *combined* prediction, and its gradient
    passes through both branches. Where both are in one batch, both halves get the same shift: the
    pipeline's ``u + w (c - u)`` then has it once, for any scale ``w``. Where they are two calls
    (FLUX, Wan), the combined prediction is known in the second, the unconditional one, which gets
    the shift divided by ``1 - w``: of ``(1 - w) u`` the same is left.

    Args:
        pipe: a pipeline of a known kind.
        guidance: what is minimised and how; without ``inner_steps`` and time travel, and with
            ``clean_noise="matched"`` where it moves the clean estimate.
        target: what the energy is told of each sample, ``(N, ...)``: one row for each image or
            video that a call of the pipeline makes.
        guidance_scale: the pipeline's, if it does not tell (PixArt, DiT, ModelScope); for FLUX its
            ``true_cfg_scale`` where a negative prompt is given.
        decode: the energy is of pixels, which the pipeline's VAE makes of latents; without, it is
            of latents. An energy that is :class:`Decoded` stays as it is.
        checkpointing: computes network and decoder again in the backward pass, to save memory.
        seed: of smoothing and augmentation.
        largest_move: see :meth:`fewstep.guidance.trace.Trace.check`; None leaves the check out.

    Raises:
        FewstepError: if pipeline, scheduler or guidance are of a kind that this cannot do, under
            inference_mode, or if guidance diverged.
    """
    refuse_what_is_no_shift(guidance)
    layout = layout_of(pipe, guidance_scale)
    vae = getattr(pipe, "vae", None)
    if decode and vae is not None and not isinstance(guidance.energy, Decoded):
        codec = LatentCodec.of(vae)
        energy = Decoded(guidance.energy, codec, checkpointed=checkpointing)
        guidance = replace(guidance, energy=energy)
    network = getattr(pipe, layout.part)
    own = vars(network).get("forward")

    def begin() -> PipelineRun:
        return PipelineRun(pipe.scheduler, layout, guidance, target, seed, checkpointing)

    guided = GuidedPipeline(pipe, network.forward, layout, guidance, guidance_scale, begin)
    guided.largest_move = largest_move
    network.forward = guided.forward()
    try:
        with frozen(network, guidance.energy):
            yield guided
        guided.check()
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


class GuidedPipeline:
    """What :func:`guide` gives, with the trace of the pipeline's latest run."""

    largest_move: float | None = None

    def __init__(
        self,
        pipe: Any,
        plain: Callable[..., Any],
        layout: Layout,
        guidance: Guidance,
        guidance_scale: float | None,
        begin: Callable[[], PipelineRun],
    ) -> None:
        self.pipe, self.plain, self.layout = pipe, plain, layout
        self.guidance, self.guidance_scale = guidance, guidance_scale
        self.begin = begin
        self.signature = inspect.signature(plain)
        self.run: PipelineRun | None = None

    @property
    def trace(self) -> Trace:
        """How the latest run went; ``finished`` is of its last guided estimate.

        Raises:
            FewstepError: if there was none.
        """
        if self.run is None or self.run.last is None:
            raise FewstepError("The pipeline has taken no guided step yet, so there is no trace.")
        return self.run.recorder.close(self.run.last, None)

    def check(self) -> None:
        """Refuses a latest run that went wrong.

        Raises:
            FewstepError: see :meth:`fewstep.guidance.trace.Trace.check`.
        """
        if self.largest_move is not None and self.run is not None and self.run.last is not None:
            self.trace.check(self.largest_move)

    def forward(self) -> Callable[..., Any]:
        """The network's forward pass, with guidance."""

        @wraps(self.plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._called(self.signature.bind(*args, **kwargs))

        return forward

    def _called(self, call: inspect.BoundArguments) -> Any:
        given = call.arguments
        if given.get("skip_layers") is not None:
            raise FewstepError("Guidance knows no skip_layer_guidance; leave it out of the call.")
        times = self.pipe.scheduler.timesteps
        if self.run is None or self.run.times is not times:  # set anew by each call of a pipeline
            self.check()
            self.run = self.begin()
        scale = scale_now(self.pipe, self.layout, self.guidance_scale)
        t = float(torch.as_tensor(given["timestep"]).flatten()[0]) * self.layout.time_unit
        step = self.run.step_at(t, scale)
        if not (self.guidance.window.holds(step) and moves(step)):
            return self.plain(*call.args, **call.kwargs)
        sample = next(iter(self.signature.parameters))

        def network(state: Tensor) -> Any:
            given[sample] = state
            return self.plain(*call.args, **call.kwargs)

        def unpacked(latents: Tensor) -> Tensor:
            return self.layout.unpacked(latents, given)

        return self.run.guided(network, given[sample], step, scale, unpacked)
