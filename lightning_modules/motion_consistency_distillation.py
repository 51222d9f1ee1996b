"""Motion Consistency Model (Zhai et al., NeurIPS 2024, arXiv 2406.06890).

Consistency distillation of videos in which only a representation of motion must agree with the
teacher's trajectories, while single frames are judged beside real pictures; and part of the
trajectories start from what the student itself makes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from fewstep.contracts import Alarm, Batch
from fewstep.errors import FewstepError
from fewstep.networks import ema_update
from fewstep.networks.latents import LatentCodec
from fewstep.networks.motion import (
    COLLAPSED_VARIANCE,
    LearnableHead,
    MotionRepresentation,
    motion_statistics,
)
from fewstep.seeding import numpy_generator
from lightning_modules.conditioning import drop_cond
from lightning_modules.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDraws,
    Pair,
)
from lightning_modules.frame_adversary import FrameAdversary, Looks, how_told_apart
from lightning_modules.gradients import is_sharded
from lightning_modules.roles import Evaluations, TeacherSource, Update, frozen, run_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MotionDraws(ConsistencyDraws):
    """Randomness of one step: that of consistency distillation, mixing and the adversary.

    ``start (B, ...)`` is the noise that a generated trajectory's clean sample is made from; the
    rest is said in :meth:`FrameAdversary.draw`, and empty ``(B, 0)`` without an adversary.
    """

    start: Tensor
    fake_frames: Tensor
    real_frames: Tensor
    fake_look: Tensor
    real_look: Tensor
    mix: Tensor


def published_adamw(
    parameters: Iterable[Any], lr: float = 1e-4, weight_decay: float = 0.0
) -> AdamW:
    """The discriminator's optimiser of MCM."""
    return AdamW(parameters, lr=lr, weight_decay=weight_decay)


class MotionConsistencyDistillation(ConsistencyDistillation):
    """MCM: disentangled motion distillation, frame adversary, mixed trajectories.

    Args:
        teacher: a checkpoint, run or experiment folder, or a factory of a denoiser.
        motion: what of student and target must agree. A trainable representation is trained along
            with the student, the target's being its average; neither is needed for sampling.
        motion_optimizer: makes a trainable representation's optimiser; by default the student's, as
            published. Fast ones let it collapse.
        motion_ema_decay: decay of that average (released code: 0.95).
        adversary: judges frames; null leaves their looks to the teacher's videos.
        discriminator_optimizer: makes the discriminator's optimiser; by default as published for
            a batch of 128 videos, :func:`published_adamw`.
        generated_share: chance of a trajectory to start from a sample that the student makes of
            pure noise in one step, instead of a video (published: 0.5). With generated ones alone,
            1, MCM's authors saw artefacts at every number of steps.
        base: options of :class:`ConsistencyDistillation` and of
            :class:`~lightning_modules.base.FewStepModule`.

    Raises:
        FewstepError: for a chance that is none, or an adversary with a VAE in float16.
    """

    def __init__(
        self,
        teacher: TeacherSource,
        motion: MotionRepresentation | None = None,
        motion_optimizer: OptimizerCallable | None = None,
        motion_ema_decay: float = 0.95,
        adversary: FrameAdversary | None = None,
        discriminator_optimizer: OptimizerCallable = published_adamw,
        generated_share: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(teacher=teacher, **base)
        self.make_motion = motion or LearnableHead()
        self.motion_ema_decay = motion_ema_decay
        self.adversary = adversary
        self.generated_share = generated_share
        if not 0 <= generated_share <= 1:
            raise FewstepError(f"generated_share is a chance, 0 to 1, not {generated_share}.")
        if generated_share == 1:
            logger.warning(
                "generated_share is 1: the student sees no real trajectory at all, which MCM's "
                "authors found to fail (artefacts at 1, 2, 4 and 8 steps). They use 0.5."
            )
        if adversary is not None and self.encoder_precision == "float16":
            raise FewstepError(
                "encoder_precision is float16, and the adversary's gradient goes through the VAE's "
                "decoder, where most of it is too small for float16 and would be lost. Set "
                "encoder_precision: bfloat16, or float32."
            )
        if self.make_motion.trainable:
            self.make_optimizer["motion"] = motion_optimizer or self.make_optimizer["student"]
        if adversary is not None:
            self.make_optimizer["discriminator"] = discriminator_optimizer
            self.frozen_roles = ("teacher", "features")

    def build_roles(self) -> None:
        super().build_roles()
        # A copy, so that a module built twice from the same options trains its own.
        self.motion = copy.deepcopy(self.make_motion)
        self.motion.configure(self.student.sample_shape)
        if self.motion.trainable:
            self.motion_average = cast(MotionRepresentation, frozen(copy.deepcopy(self.motion)))
        if self.adversary is not None:
            self.discriminator = self.adversary.build()
            self.features = self.adversary.features
            self.provenance["features"] = self.features.origin()

    # ------------------------------------------------------------------ what a step starts from

    def _encoded(self, batch: Batch, stream: str, number: int) -> Batch:
        """Keeps the pixels, and tosses a coin for each sample on the host.

        What the host knows costs no synchronisation, and pixels that no trajectory starts from need
        no encoding.
        """
        places = self._places(batch)
        tosses = numpy_generator(run_seed(), f"{stream}-mixing", number).random(places.stop)
        mine = tosses[places.start :] < self.generated_share
        known: Batch = {**batch, "pixels": batch["sample"], "generated": mine.tolist()}
        encoded = super()._encoded(known, stream, number)
        if "images" in encoded:
            encoded["images"] = self._with_text(encoded["images"])
        return encoded

    def _with_text(self, images: Batch) -> Batch:
        """The images beside the videos, their prompts encoded if the heads are told of them so."""
        told = None if self.adversary is None else self.adversary.told_of_images()
        if told is None or told in images["cond"] or self.companions is None:
            return images
        prompts, backbone = images.get("prompt"), self.student.backbone
        return {**images, "cond": self.companions.with_prompts(images["cond"], prompts, backbone)}

    def _latents(self, batch: Batch, noise: Callable[[], Tensor]) -> Tensor:
        """Latents of the samples that trajectories start from; zeros for the others."""
        chosen = batch["generated"]
        if not any(chosen) or tuple(batch["sample"].shape[1:]) == self.sample_shape:
            return super()._latents(batch, noise)
        rows = [row for row, generated in enumerate(chosen) if not generated]
        blank = batch["sample"].new_zeros(self.sample_shape)
        found: Iterator[Tensor] = iter(())
        if rows:
            some: Batch = {**batch, "sample": _rows(batch["sample"], rows)}
            found = iter(super()._latents(some, lambda: _rows(noise(), rows)))
        return torch.stack([blank if generated else next(found) for generated in chosen])

    def _starts(self, batch: Batch, draws: MotionDraws) -> Tensor:
        """Clean samples of the batch's trajectories: real ones, and some the student makes."""
        chosen = batch["generated"]
        rows = [row for row, generated in enumerate(chosen) if generated]
        if not rows:
            # The backbone's weights, as a student of adapters does not own those that are sharded.
            weights = list(self.student.backbone.parameters())
            if not (self.generated_share and is_sharded(weights)):
                return batch["sample"]
            rows = [0]  # ranks gather a sharded student together, so none may leave it out
        cond = drop_cond(self.student.backbone, batch["cond"], draws.dropped)
        cond = self._with_guidance(cond, draws.guidance)
        noise = _rows(draws.start, rows)
        with torch.no_grad():
            t = self.phases.grid.times.on(noise.device)[-1].expand(len(rows))
            made = self.student(noise, t, {name: _rows(c, rows) for name, c in cond.items()}).x0
        made = iter(made.to(batch["sample"].dtype))
        real = batch["sample"].unbind(0)
        return torch.stack([next(made) if c else r for c, r in zip(chosen, real, strict=True)])

    # ------------------------------------------------------------------ the step

    def draw(self, batch: Batch, generator: torch.Generator) -> MotionDraws:
        common = vars(super().draw(batch, generator))
        x0, device = batch["sample"], generator.device
        none = torch.empty(len(x0), 0, device=device)
        looks = dict.fromkeys(("fake_frames", "real_frames", "fake_look", "real_look", "mix"), none)
        if self.adversary is not None:
            frames, vae = self.sample_shape[1], self.companions
            frames = frames if vae is None else vae.pixel_frames(frames)
            looks = self.adversary.draw(batch, generator, frames)
        start = torch.randn(x0.shape, generator=generator, device=device)
        return MotionDraws(**common, **looks, start=start)

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        assert isinstance(draws, MotionDraws)
        pair = self.pair({**batch, "sample": self._starts(batch, draws)}, draws)
        motion = self.motion(pair.student)
        consistency = self.motion_loss(pair, motion)
        logs = {"consistency": consistency}
        if self.motion.trainable:
            logs |= motion_statistics(motion, self.motion.untrained(pair.student))
        along = ("motion",) if self.motion.trainable else ()
        if self.adversary is None:
            yield Update("student", consistency, logs, along)
            return

        fake = self._look_at_fakes(pair, batch, draws)
        tokens = self.features.tokens(fake.prepared)
        scores = self.discriminator.score(tokens, fake.cond)
        adversarial = self.adversary.generator_loss([scores])
        loss = consistency + self.adversary.weight * adversarial
        yield Update("student", loss, {**logs, "adversarial": adversarial}, along)
        yield self._discriminator_update(batch, draws, fake, [t.detach() for t in tokens])

    def motion_loss(self, pair: Pair, motion: Tensor) -> Tensor:
        """Distance of the student's motion from the target's."""
        with torch.no_grad():
            head = self.motion_average if self.motion.trainable else self.motion
            target = head(pair.target)
        return self.consistency_loss(pair._replace(student=motion, target=target))

    def _codec(self, device: torch.device) -> LatentCodec | None:
        return None if self.companions is None else self.companions.codec.to(device)

    def _look_at_fakes(self, pair: Pair, batch: Batch, draws: MotionDraws) -> Looks:
        """Some frames of what the student predicts, with gradient to it."""
        assert self.adversary is not None
        codec, chosen = self._codec(pair.student.device), (draws.fake_frames, draws.fake_look)
        return self.adversary.fakes(pair.student, batch, *chosen, codec)

    def _look_at_reals(self, batch: Batch, draws: MotionDraws) -> Looks:
        """Frames of the batch's videos, or the images beside them."""
        assert self.adversary is not None
        codec, chosen = self._codec(batch["sample"].device), (draws.real_frames, draws.real_look)
        return self.adversary.reals(batch, *chosen, codec)

    def _discriminator_update(
        self, batch: Batch, draws: MotionDraws, fake: Looks, fake_tokens: Sequence[Tensor]
    ) -> Update:
        """Tells real pictures from frames already looked at for the student's turn."""
        assert self.adversary is not None
        real = self._look_at_reals(batch, draws)
        with torch.no_grad():
            real_tokens = self.features.tokens(real.prepared)
        real_scores = self.discriminator.score(real_tokens, real.cond)
        fake_scores = self.discriminator.score(fake_tokens, fake.cond)
        loss = self.adversary.discriminator_loss([real_scores], [fake_scores])
        logs = {"discriminator": loss, **how_told_apart(real_scores, fake_scores)}
        if self.adversary.penalty and torch.is_grad_enabled():
            penalty = self.adversary.penalty_on(self.discriminator, real, fake, draws.mix)
            loss, logs["penalty"] = loss + self.adversary.penalty * penalty, penalty
        return Update("discriminator", loss, logs)

    def after_update(self) -> None:
        """Averages the representation; takes the heads' spectral norms on."""
        if self.motion.trainable:
            ema_update(self.motion_average, self.motion, self.motion_ema_decay)
        if self.adversary is not None:
            self.discriminator.advance()

    # ------------------------------------------------------------------ the record

    def alarms(self) -> list[Alarm]:
        """A representation that is trained to make two branches agree can do so by forgetting."""
        if not self.make_motion.trainable:
            return []
        advice = (
            "The learnable motion representation is collapsing: it says less and less about its "
            "input, so the motion loss falls without the student learning motion. Lower "
            "motion_optimizer's lr, or use fewstep.networks.motion.FrameDifference."
        )
        return [Alarm("train/motion_variance", below=COLLAPSED_VARIANCE, advice=advice)]

    def method_metadata(self) -> dict[str, Any]:
        return {**super().method_metadata(), "motion": type(self.make_motion).__name__}

    def evaluations(self) -> dict[str, Evaluations]:
        counts = super().evaluations()
        if self.generated_share:
            student = counts["student"]
            counts["student"] = Evaluations(student.forward + 1, student.backward)
        if self.adversary is not None:
            counts["features"] = Evaluations(forward=2, backward=1)
            counts["discriminator"] = Evaluations(forward=3, backward=2)
        return counts


def _rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, without an index on the device for which the host would wait."""
    return torch.stack([values[row] for row in rows])
