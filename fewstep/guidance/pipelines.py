"""Guidance of plain diffusers pipelines, whatever their scheduler.

``with guide(pipe, guidance, target) as guided: pipe(...)``, and then ``guided.trace``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.energies import Decoded, Target
from fewstep.guidance.freezing import frozen
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.layouts import Layout, layout_of, scale_now
from fewstep.guidance.pipeline_runs import PipelineRun
from fewstep.guidance.sampler import own_stream
from fewstep.guidance.shifts import moves, refuse_what_is_no_shift
from fewstep.guidance.steps import Step
from fewstep.guidance.trace import LARGEST_MOVE, Trace
from fewstep.networks.latents import LatentCodec
from fewstep.seeding import torch_generator


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
    generator: Sequence[torch.Generator] | None = None,
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
        seed: of smoothing and augmentation, which draw by the sample's place in the batch and the
            number of the pipeline's run.
        generator: those that the pipeline's own ``generator`` has, one for each sample. Smoothing
            and augmentation then draw beside these instead, and no result depends on batch mates.
        largest_move: see :meth:`fewstep.guidance.trace.Trace.check`; None leaves the check out.

    Raises:
        FewstepError: if pipeline, scheduler or guidance are of a kind that this cannot do, under
            inference_mode, or if guidance diverged.
    """
    refuse_what_is_no_shift(guidance)
    layout = layout_of(pipe, guidance_scale)
    vae = getattr(pipe, "vae", None)
    refuse_offloading(getattr(pipe, layout.part), vae)
    if decode and vae is not None and not isinstance(guidance.energy, Decoded):
        codec = LatentCodec.of(vae)
        energy = Decoded(guidance.energy, codec, checkpointed=checkpointing)
        guidance = replace(guidance, energy=energy)
    network = getattr(pipe, layout.part)
    source = Draws(seed, generator)
    with ExitStack() as replaced:
        guided = GuidedPipeline(
            pipe, layout, guidance, target, guidance_scale, source, checkpointing, replaced
        )
        guided.largest_move = largest_move
        replaced.enter_context(_replaced(network, "forward", guided.forward()))
        replaced.enter_context(frozen(network, guidance.energy))
        yield guided
        guided.check()


def refuse_offloading(*parts: Any) -> None:
    """Refuses networks that leave the GPU between their calls.

    Raises:
        FewstepError: if one does.
    """
    if any(map(_offloads, parts)):
        raise FewstepError(
            "Guidance takes a gradient through network and decoder at once, and this pipeline "
            "moves them to the CPU after each call (enable_model_cpu_offload or "
            "enable_sequential_cpu_offload). Use pipe.remove_all_hooks() and pipe.to('cuda'); to "
            "save memory there are checkpointing=True, pipe.vae.enable_slicing() and a window "
            "with every."
        )


def _offloads(part: Any) -> bool:
    """Whether hooks of accelerate or of diffusers move a network, or parts of it, to and fro."""
    if not isinstance(part, nn.Module):
        return False
    hooks = [getattr(module, "_hf_hook", None) for module in part.modules()]
    hooks += [one for hook in hooks for one in getattr(hook, "hooks", ())]  # of a SequentialHook
    kinds = {type(hook).__name__ for hook in hooks}
    known = [getattr(module, "_diffusers_hook", None) for module in part.modules()]
    grouped = any("group_offloading" in (getattr(one, "hooks", None) or {}) for one in known)
    return grouped or "CpuOffload" in kinds or any(getattr(h, "offload", False) for h in hooks)


@contextmanager
def _replaced(thing: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile an object has another method of that name."""
    own = vars(thing).get(name)
    setattr(thing, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)


@dataclass
class Draws:
    """Where random views and noisy copies come from.

    Attributes:
        seed, generator: see :func:`guide`.
        runs: of the pipeline so far.
    """

    seed: int
    generator: Sequence[torch.Generator] | None
    runs: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.generator, torch.Generator):
            raise FewstepError(
                "guide() was given one generator; give each sample its own, generator=[...], to "
                "the pipeline as well."
            )

    def begin(self) -> Callable[[int], Sequence[torch.Generator]]:
        """What gives a run's generators, one for each of so many samples."""
        self.runs += 1
        run, beside = self.runs, own_stream(self.generator)

        def draws(count: int) -> Sequence[torch.Generator]:
            if not isinstance(beside, Sequence):
                return [torch_generator(self.seed, "guidance", run, row) for row in range(count)]
            if len(beside) != count:
                raise FewstepError(
                    f"guide() was given {len(beside)} generators for {count} samples; give each "
                    "sample its own, as to the pipeline."
                )
            return beside

        return draws


class GuidedPipeline:
    """What :func:`guide` gives, with the trace of the pipeline's latest run."""

    largest_move: float | None = None

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        guidance: Guidance,
        target: Target,
        guidance_scale: float | None,
        draws: Draws,
        checkpointing: bool,
        replaced: ExitStack,
    ) -> None:
        self.pipe, self.layout = pipe, layout
        self.guidance, self.target = guidance, target
        self.guidance_scale, self.draws = guidance_scale, draws
        self.checkpointing, self.replaced = checkpointing, replaced
        self.plain: Callable[..., Any] = getattr(pipe, layout.part).forward
        self.signature = inspect.signature(self.plain)
        self.sample = next(iter(self.signature.parameters))
        self.watched: list[Any] = []
        self.run: PipelineRun | None = None

    @property
    def trace(self) -> Trace:
        """How the latest run went; ``finished`` is of its last guided estimate.

        Raises:
            FewstepError: if there was none.
        """
        if self.run is None or self.run.last is None:
            raise FewstepError("The pipeline has taken no guided step yet, so there is no trace.")
        return self.run.recorder.trace(self.run.last)

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
        run = self._run(given)
        scale = scale_now(self.pipe, self.layout, self.guidance_scale)
        step = run.called(scale)
        if self.guidance.window.holds(step) and moves(step):
            found = self._guided(run, call, step, scale)
        else:
            found = self.plain(*call.args, **call.kwargs)
        run.recorder.clock.lap()
        return found

    def _guided(
        self, run: PipelineRun, call: inspect.BoundArguments, step: Step, scale: float
    ) -> Any:
        def network(state: Tensor) -> Any:
            call.arguments[self.sample] = state
            return self.plain(*call.args, **call.kwargs)

        return run.guided(network, call.arguments[self.sample], step, scale)

    def _run(self, given: dict[str, Any]) -> PipelineRun:
        """The run that a call of the network belongs to, which begins with its first."""
        scheduler = self.pipe.scheduler
        if self.run is None or self.run.times is not scheduler.timesteps:  # set anew by each run
            self.check()
            self.run = PipelineRun(
                scheduler,
                self.layout,
                self.guidance,
                self.target,
                self.draws.begin(),
                self.checkpointing,
                given,
                self.sample,
            )
            self._watch(scheduler)
        return self.run

    def _watch(self, scheduler: Any) -> None:
        """Counts a scheduler's steps, by which a run knows where it is."""
        if any(scheduler is known for known in self.watched):
            return
        plain = scheduler.step

        @wraps(plain)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.run is not None:
                self.run.stepped()
            return plain(*args, **kwargs)

        self.watched.append(scheduler)
        self.replaced.enter_context(_replaced(scheduler, "step", step))
