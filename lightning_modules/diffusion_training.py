"""Training a diffusion or flow model from scratch: the teacher of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.diffusion import (
    Backbone,
    Denoiser,
    DenoiserLike,
    PredictionType,
    Schedule,
    VPSchedule,
    ancestral_sample,
    ancestral_times,
    network_target,
    variational_bound,
)
from fewstep.diffusion.losses import mse
from fewstep.errors import FewstepError
from fewstep.networks.gates.gate import Gate
from fewstep.seeding import Generators
from lightning_modules.base import FewStepModule
from lightning_modules.conditioning import drop_cond
from lightning_modules.optimisation import Draws
from lightning_modules.roles import Evaluations, TeacherSource, Update, load_teacher
from lightning_modules.sensitivity_penalty import SensitivityPenalty
from lightning_modules.steering import Steering


@dataclass(frozen=True)
class DiffusionDraws(Draws):
    """Randomness of one step: times ``(B,)``, noise ``(B, ...)``, dropped conditions ``(B,)``."""

    t: Tensor
    noise: Tensor
    dropped: Tensor


class DiffusionTraining(FewStepModule):
    """Denoising training with any prediction type (Ho et al. 2020; Lipman et al. 2023).

    A backbone with learned variances learns them by the variational bound, which does not touch
    what it predicts: the hybrid loss of Nichol & Dhariwal (2021), with the weight of 1 that the
    bound has in the code of DiT and Latte.

    Args:
        backbone: makes the network.
        schedule: its noise schedule.
        prediction_type: what the network learns to output.
        start: trained weights to go on from, instead of these three: a checkpoint, a run's folder
            or a diffusers pipeline.
        cond_dropout: share of samples trained without their condition, for guidance.
        sensitivity: a penalty on residual units that amplify; none by default.
        sampler: ``ode`` follows the probability-flow ODE; ``ddpm`` draws each step from the reverse
            process, with learned variances if there are any.
        guided_channels: guide so many channels of a sample alone; all by default. DiT guides the
            first three of a latent's four.
        base: options of :class:`~lightning_modules.base.FewStepModule`.
    """

    def __init__(
        self,
        backbone: Callable[[], Backbone] | None = None,
        schedule: Schedule | None = None,
        prediction_type: PredictionType = "epsilon",
        cond_dropout: float = 0.1,
        start: TeacherSource | None = None,
        sensitivity: SensitivityPenalty | None = None,
        sampler: Literal["ode", "ddpm"] = "ode",
        guided_channels: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.make_backbone = backbone
        if schedule is not None:
            self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self.cond_dropout = cond_dropout
        self.start = start
        self.sensitivity = sensitivity or SensitivityPenalty()
        self.sampler = sampler
        self.guided_channels = guided_channels
        self._weighed: list[list[Gate]] = []
        if self.lora is not None:
            self.frozen_roles = ("teacher",)
        if (start is None) == (backbone is None) or (start is None) != (schedule is not None):
            raise FewstepError(
                "DiffusionTraining needs either a backbone and a schedule, or `start`, a trained "
                "network that brings both."
            )
        if self.lora is not None and start is None:
            raise FewstepError("A LoRA adapts a trained network: give DiffusionTraining a `start`.")

    def build_roles(self) -> None:
        if self.start is not None:
            network, self.provenance["teacher"] = load_teacher(self.start)
            self.start_student(network)
            self.prediction_type = self.student.prediction_type
        else:
            assert self.make_backbone is not None
            self.student = Denoiser(self.make_backbone(), self.schedule, self.prediction_type)
        self.schedule = self.student.schedule
        if self.sampler == "ddpm":
            for steps in self.step_counts():
                ancestral_times(self.schedule, steps)
        channels = self.student.sample_shape[0]
        if self.guided_channels is not None and not 1 <= self.guided_channels <= channels:
            raise FewstepError(
                f"guided_channels is how many of a sample's {channels} channels are guided, not "
                f"{self.guided_channels}; null guides all."
            )
        if self.student.backbone.learned_variance and not isinstance(self.schedule, VPSchedule):
            raise FewstepError(
                "Variances are learned by the bound of a variance-preserving schedule, not of "
                f"{type(self.schedule).__name__}: set the backbone's learned_variance to false."
            )

    def configure_model(self) -> None:
        """Builds the roles, and makes sure that the penalty has something to say."""
        if "student" not in self._modules:
            super().configure_model()
            self._weighed = self.sensitivity.check(self.student, self.compile_blocks)

    def draw(self, batch: Batch, generator: torch.Generator) -> DiffusionDraws:
        x0 = batch["sample"]
        size, device = len(x0), generator.device
        return DiffusionDraws(
            t=self.schedule.sample_times((size,), generator),
            noise=torch.randn(x0.shape, generator=generator, device=device),
            dropped=torch.rand(size, generator=generator, device=device) < self.cond_dropout,
        )

    def updates(self, batch: Batch, draws: DiffusionDraws) -> Iterator[Update]:
        t, noise = draws.t, draws.noise
        x0 = batch["sample"]
        cond = drop_cond(self.student.backbone, batch["cond"], draws.dropped)
        x_t = self.schedule.add_noise(x0, noise, t)
        target = network_target(x0, noise, *self.schedule.levels(t, x0), self.prediction_type)
        penalty, number = self.sensitivity, self.student_updates
        with penalty.watching(self.student, number, self._generator) as measured:
            output, told = self.student.outputs(x_t, t, cond)
            loss = mse(output, target)
        total, terms = penalty.added_to(loss, self._weighed, measured)
        if told is not None:
            assert isinstance(self.schedule, VPSchedule)
            predicted = self.student.interpret(output.detach(), x_t, t).x0
            bound = variational_bound(self.schedule, x0, x_t, t, predicted, told).mean()
            total, terms = total + bound, {**terms, "bound": bound}
        yield Update("student", total, {"loss": loss, **terms})

    def steer(self, steering: Steering) -> None:
        """Steers all sampling from now on.

        Raises:
            FewstepError: with DDPM's sampler. Steered samples follow the ODE, and so must those
                that they are compared with.
        """
        if self.sampler == "ddpm":
            raise FewstepError(
                "Steered samples follow the ODE, and this run samples by DDPM. Set "
                "--model.init_args.sampler ode, so that guidance alone makes the difference."
            )
        super().steer(steering)

    def sampling_record(self) -> dict[str, Any]:
        options = {"sampler": self.sampler, "guided_channels": self.guided_channels}
        return {name: value for name, value in options.items() if value not in ("ode", None)}

    def method_metadata(self) -> dict[str, Any]:
        found = self.sampling_record()
        return {"sampling": found} if found else {}

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators,
    ) -> Tensor:
        if self.sampler == "ddpm":
            times = ancestral_times(denoiser.schedule, num_steps)
            return ancestral_sample(denoiser, noise, cond, times, generator)
        return super().sample_from(denoiser, noise, cond, num_steps, generator)

    def to_log(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """All but the penalty's rare term, which goes to the loggers at the updates that have it.

        Lightning would repeat its last value at all others. It is read here and now, as costs
        little beside what the term does.
        """
        term = means.pop("sensitivity", None)
        if term is not None and self.trainer.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics({"train/sensitivity": term.item()}, self.trainer.global_step)
        return means

    def evaluations(self) -> dict[str, Evaluations]:
        return {"student": Evaluations(forward=1, backward=1)}
