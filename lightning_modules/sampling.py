"""How the roles of a method sample, and what callbacks may ask about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import Denoiser, DenoiserLike, Guided, ode_sample
from fewstep.errors import FewstepError
from fewstep.seeding import Generators
from lightning_modules.companions import Companions
from lightning_modules.conditioning import in_float32
from lightning_modules.optimised_roles import OptimisedRoles


class SampledRoles(OptimisedRoles):
    """Roles that sample: the student, its average, and a teacher beside them.

    Attributes:
        sampling_guidance: guidance scale when sampling; 1 is off.
        guided_channels: how many channels of a sample are guided, where not all are.
        measured_steps: numbers of sampling steps to measure at, if they were chosen.
        companions: text encoders and VAE, where samples are latents of a pipeline.
    """

    frozen_roles: tuple[str, ...] = ()

    student: Denoiser
    teacher: Denoiser
    ema: Denoiser | None
    sampling_guidance: float
    guided_channels: int | None = None
    measured_steps: list[int] | None
    companions: Companions | None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch dimension."""
        return self.student.sample_shape

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators,
    ) -> Tensor:
        """How this method's student samples; by default along the probability-flow ODE."""
        times = denoiser.schedule.spaced_times(num_steps)
        return ode_sample(denoiser, noise, cond, times)

    def sampling_record(self) -> dict[str, Any]:
        """What of how samples are drawn a run may choose and did, in plain values.

        Measurements of samples that were drawn in another way are not kept beside its own.
        """
        return {}

    def sampling_roles(self) -> list[str]:
        """Roles that can sample, the default one first."""
        roles = ["ema"] if self.ema is not None else []
        return [*roles, "student", *(r for r in self.frozen_roles if r == "teacher")]

    def checked_role(self, role: str | None) -> str:
        """A role that can sample, the default one if none is named.

        Raises:
            FewstepError: for one that cannot.
        """
        roles = self.sampling_roles()
        role = roles[0] if role is None else role
        if role not in roles:
            raise FewstepError(f"'{role}' cannot sample in this run; choose from {roles}.")
        return role

    def step_counts(self, role: str | None = None) -> list[int]:
        """The numbers of sampling steps to measure a role at, unless told otherwise."""
        return self.measured_steps or [1, 2, 4, 8]

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, guidance included."""
        return num_steps * (1 if self.guidance_scale(role) == 1 else 2)

    def guidance_scale(self, role: str | None = None) -> float:
        """The guidance scale a role samples with; 1 is off."""
        return self.sampling_guidance

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators = None,
        role: str | None = None,
        prompt: list[str] | None = None,
    ) -> Tensor:
        """Turns noise ``(B, ...)`` into samples.

        Args:
            noise: standard normal noise.
            cond: conditioning under the backbone's argument names.
            num_steps: sampling steps.
            generator: for samplers that draw: one on the noise's device, or one on the CPU for each
                sample.
            role: whose weights; the averaged student by default. ``teacher`` follows the ODE.
            prompt: captions, encoded by the pipeline's text encoders if there are any; what
                ``cond`` has already goes first.

        Raises:
            FewstepError: for a role that cannot sample, or a step count the student cannot serve.
        """
        role = self.checked_role(role)
        if prompt is not None and self.companions is not None:
            cond = self.companions.with_prompts(cond or {}, prompt, self.student.backbone)
        cond = None if cond is None else in_float32(cond)
        scale = self.guidance_scale(role)
        denoiser = Guided(getattr(self, role), scale, channels=self.guided_channels)
        if role == "teacher":
            return SampledRoles.sample_from(self, denoiser, noise, cond, num_steps, generator)
        return self.sample_from(denoiser, noise, cond, num_steps, generator)

    def decode(self, x0: Tensor) -> Tensor:
        """Samples to pixels in [-1, 1]; pixel-space models only clamp."""
        if self.companions is not None:
            return self.companions.decoded(x0)
        return x0.clamp(-1, 1) if x0.ndim > 2 else x0
