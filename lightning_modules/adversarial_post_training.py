"""Adversarial Post-Training (APT; Lin et al., ICML 2025, arXiv 2501.08316).

A diffusion model becomes a generator of one step in a plain GAN's game with real data, without a
teacher. The first stage, which makes the generator's start, is consistency distillation with a
constant guidance scale, a fixed negative prompt and the mean squared distance
(:class:`~lightning_modules.consistency_distillation.ConsistencyDistillation`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import RMSprop

from fewstep.contracts import Alarm, Batch
from fewstep.diffusion import Denoiser, DenoiserLike
from fewstep.diffusion.tables import work_dtype
from fewstep.errors import FewstepError
from fewstep.networks.query_discriminator import QueryDiscriminator
from fewstep.networks.reshaping import for_samples_of
from fewstep.seeding import Generators
from lightning_modules.adversarial_game import AdversarialDraws, AdversarialGame
from lightning_modules.base import FewStepModule, Turn
from lightning_modules.chains import post_trained_chain
from lightning_modules.parallel import ShardedStrategy
from lightning_modules.roles import Evaluations, TeacherSource, Update, load_teacher
from lightning_modules.spread import between_seeds, moments, spreads

Cond = dict[str, Tensor]
WON_GAP = 4.0  # real samples are then e^4 times as likely real; without aR1 it grows further
LOST_SPREAD = 0.05  # of the real data's variance
LOST_SEED_SPREAD = 0.005  # a detailed condition leaves seeds less room


def rms_prop(parameters: Iterable[Any], lr: float = 5e-6, alpha: float = 0.9) -> RMSprop:
    """RMSProp as published: Adam without a first moment, but without its bias correction too."""
    return RMSprop(parameters, lr=lr, alpha=alpha)


class AdversarialPostTraining(FewStepModule):
    """APT: a one-step generator against a discriminator that is a whole diffusion model.

    Discriminator and student are updated in turn, the discriminator first, both on the batch's
    conditions, with noise of their own. The student is only ever evaluated at pure noise.

    Args:
        start: what the student starts from: the run of the stage before, of which its average is
            taken, as ``teacher`` of other methods says. It may have been trained on samples of
            another shape, such as images before videos: the student then makes the teacher's.
        teacher: the diffusion model whose weights the discriminator starts from. Give it anew in
            each stage: the paper starts its video stage's discriminator from it again.
        loss: ``non_saturating`` with the penalty on real samples, as published; or
            ``relativistic``, which pairs real and generated samples and penalises both (APT's
            successor; R3GAN proves that this converges locally).
        penalty: weight of the approximated R1 (published: 100) and, with pairs, R2 (AAPT: 1000).
        sigma: standard deviation of its perturbation, in latents of about unit variance (published:
            0.01 for images, 0.1 for videos). What counts is about ``penalty * sigma**2``.
        exact_penalty: use the gradients themselves, with weight ``penalty * sigma**2``. They are
            differentiated twice, which neither flash attention nor FSDP2 can: for small networks.
        time_shift: how much the times that the discriminator is told lean towards noise: 1 is
            uniform (published for images), 12 what the paper uses for videos.
        discriminator_optimizer: makes the discriminator's optimiser (published: the student's).
        discriminator_blocks: blocks it reads; by default the published depths, 16, 26 and 36 of 36,
            scaled to the network.
        wide: in bf16-mixed, keep the discriminator's tokens in float32 from block to block, where
            blocks still compute in bfloat16. Otherwise rounding raises a penalty with a ``sigma``
            of 0.01 by half (with 0.1, by a hundredth), but what is kept for the backward pass is
            smaller.
        two_steps: what sampling in more than one step does between them: ``renoise`` the predicted
            sample, or go on along the ``line`` of the prediction. Only one step is trained; the
            paper samples in two too, without saying how, and sees artefacts beyond.
        keep_teacher: keep the diffusion model too, as a frozen role, for measuring beside it.
            Training has no use for it.
        optimizer, gradient_clip, ema_decay, ema_warmup: see
            :class:`~lightning_modules.base.FewStepModule`; by default as published for images.
        base: its further options.
    """

    def __init__(
        self,
        start: TeacherSource,
        teacher: TeacherSource,
        loss: Literal["non_saturating", "relativistic"] = "non_saturating",
        penalty: float = 100.0,
        sigma: float = 0.01,
        exact_penalty: bool = False,
        time_shift: float = 1.0,
        discriminator_optimizer: OptimizerCallable = rms_prop,
        discriminator_blocks: list[str] | None = None,
        wide: bool = True,
        two_steps: Literal["renoise", "line"] = "renoise",
        keep_teacher: bool = False,
        optimizer: OptimizerCallable = rms_prop,
        gradient_clip: float | None = None,
        ema_decay: float | None = 0.995,
        ema_warmup: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(
            optimizer=optimizer,
            gradient_clip=gradient_clip,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            **base,
        )
        if self.lora is not None:
            raise FewstepError("Adversarial post-training trains all weights; leave `lora` out.")
        if exact_penalty and self.compile_blocks:
            raise FewstepError(
                "Compiled blocks cannot be differentiated twice, as exact_penalty needs; set "
                "compile_blocks: false or exact_penalty: false."
            )
        if sigma <= 0 or time_shift <= 0:
            raise FewstepError(f"sigma ({sigma}) and time_shift ({time_shift}) must be positive.")
        self.start_source = start
        self.teacher_source = teacher
        self.game = AdversarialGame(loss == "relativistic", penalty, sigma, exact_penalty)
        self.time_shift = time_shift
        self.discriminator_blocks = discriminator_blocks
        self.wide = wide
        self.two_steps = two_steps
        self.frozen_roles = ("teacher",) if keep_teacher else ()
        self.make_optimizer["discriminator"] = discriminator_optimizer

    def build_roles(self) -> None:
        started, self.provenance["start"] = load_teacher(self.start_source)
        diffusion, self.provenance["teacher"] = load_teacher(self.teacher_source)
        self.student = self._shaped_as(diffusion, started).requires_grad_(True)
        sharded = self._trainer is not None and isinstance(self._trainer.strategy, ShardedStrategy)
        if self.game.exact and sharded:
            raise FewstepError("FSDP2 cannot differentiate twice; set exact_penalty: false.")
        if self.frozen_roles:
            self.teacher = copy.deepcopy(diffusion)
        backbone = diffusion.backbone.requires_grad_(True)
        self.discriminator = QueryDiscriminator(backbone, self.discriminator_blocks, self.wide)
        self.discriminator_schedule = diffusion.schedule

    def _shaped_as(self, diffusion: Denoiser, started: Denoiser) -> Denoiser:
        """The student for the teacher's samples; a stage on videos starts from one on images."""
        try:
            return for_samples_of(started, diffusion)
        except FewstepError as error:
            raise FewstepError(f"`start` does not fit `teacher`. {error}") from error

    # ------------------------------------------------------------------ the step

    def draw(self, batch: Batch, generator: torch.Generator) -> AdversarialDraws:
        shape, device = batch["sample"].shape, generator.device
        needed = (True, True, *self.game.perturbed)
        noises = [
            torch.randn(shape if need else (shape[0], 0), generator=generator, device=device)
            for need in needed
        ]
        positions = list(torch.rand(3, shape[0], generator=generator, device=device))
        if self.game.relativistic:  # pairs are compared under the same time
            positions[1] = positions[0]
        return AdversarialDraws(*noises, *positions)

    def turns(self) -> Sequence[Turn]:
        """The discriminator's turn, its step, then the student's against what it has become."""
        made: list[Tensor] = []
        return partial(self.discriminator_turn, made), partial(self.student_turn, made)

    def updates(self, batch: Batch, draws: AdversarialDraws) -> Iterator[Update]:
        for turn in self.turns():
            yield from turn(batch, draws)

    def discriminator_turn(
        self, made: list[Tensor], batch: Batch, draws: AdversarialDraws
    ) -> Iterator[Update]:
        """Real from generated samples; the student is only asked."""
        real = batch["sample"].to(work_dtype(batch["sample"]))
        with torch.no_grad():
            fake = self.generate(draws.noise, batch["cond"])
        made.append(fake)
        judge = partial(self.judge, batch["cond"])
        loss, logs = self.game.discriminator_loss(judge, real, fake, draws)
        if torch.is_grad_enabled():
            logs |= moments("real", real) | moments("fake", fake)
        yield Update("discriminator", loss, logs)

    def student_turn(
        self, made: list[Tensor], batch: Batch, draws: AdversarialDraws
    ) -> Iterator[Update]:
        """Samples that the discriminator takes for real; gradient only passes through it."""
        fake = self.generate(draws.student_noise, batch["cond"])
        judge = partial(self.judge, batch["cond"])
        # Until after the backward pass: FSDP2 would reduce gradients that nobody takes.
        self.discriminator.requires_grad_(False)
        real, position = batch["sample"].to(fake.dtype), draws.student_position
        adversarial = self.game.student_loss(judge, real, fake, position)
        logs = {"adversarial": adversarial}
        if torch.is_grad_enabled():
            # From the same conditions as in the discriminator's turn, whose order this one keeps,
            # and by the same weights.
            logs |= between_seeds(made.pop(0), fake)
        try:
            yield Update("student", adversarial, logs)
        finally:
            self.discriminator.requires_grad_(True)

    def generate(self, noise: Tensor, cond: Cond) -> Tensor:
        """The student's jump from pure noise to the trajectory's end, ``(B, ...)``.

        For flow matching ``z - v(z, T)`` (section 3.2 of the paper).
        """
        schedule, size = self.student.schedule, (len(noise),)
        prediction = self.student(noise, noise.new_full(size, schedule.t_max), cond)
        return schedule.jump(prediction, noise.new_full(size, schedule.t_min))

    def judge(
        self, cond: Cond, samples: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits ``(B,)`` of several lots of samples under the same conditions, in one call."""
        lots = len(samples)
        times = self.times(torch.cat(list(positions)))
        repeated = {name: torch.cat([value] * lots) for name, value in cond.items()}
        logits: Tensor = self.discriminator(torch.cat(list(samples)), times, repeated)
        return logits.chunk(lots)

    def times(self, position: Tensor) -> Tensor:
        """What the discriminator is told: positions in [0, 1), shifted, as the network's times.

        ``s u / (1 + (s - 1) u)`` of eq. 7, before anything is scaled to the network's unit.
        """
        shifted = self.time_shift * position / (1 + (self.time_shift - 1) * position)
        schedule = self.discriminator_schedule
        low = position.new_full((len(position),), schedule.t_clean)
        return schedule.time_between(low, torch.full_like(low, schedule.t_max), shifted)

    # ------------------------------------------------------------------ sampling and the record

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators,
    ) -> Tensor:
        """One jump; between several, ``two_steps`` decides."""
        chain = post_trained_chain(denoiser.schedule, num_steps, self.two_steps)
        return chain.sample(denoiser, noise, cond, generator)

    def step_counts(self, role: str | None = None) -> list[int]:
        """The one step that is trained, and two."""
        return self.measured_steps or [1, 2]

    def to_log(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the spread of samples instead of their moments."""
        return spreads(means)

    def alarms(self) -> list[Alarm]:
        """A discriminator that has won teaches nothing; a collapsed student says one thing."""
        won = (
            "The discriminator tells real from generated samples almost without fail: the student "
            "learns nothing from it, or collapses. Raise `penalty` or `sigma`, lower the learning "
            "rates, or start from a better first stage."
        )
        collapsed = (
            "Generated samples hardly differ: the student is collapsing. Go back to an earlier "
            "checkpoint, raise the batch size (`accumulate`), or use `loss: relativistic`."
        )
        seeds = collapsed.replace("differ:", "differ between seeds of one condition:")
        return [
            Alarm("train/logit_gap", above=WON_GAP, advice=won),
            Alarm("train/spread", below=LOST_SPREAD, advice=collapsed),
            Alarm("train/seed_spread", below=LOST_SEED_SPREAD, advice=seeds),
        ]

    def method_metadata(self) -> dict[str, Any]:
        sampling = {"guidance_scale": self.sampling_guidance, "two_steps": self.two_steps}
        return {"sampling": sampling}

    def evaluations(self) -> dict[str, Evaluations]:
        forward, backward = self.game.evaluations()
        return {
            "student": Evaluations(forward=2, backward=1),
            "discriminator": Evaluations(forward, backward),
        }
