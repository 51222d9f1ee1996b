"""Roles that can be steered without training, whatever method trained them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.diffusion import Backbone, Guided
from fewstep.diffusion.consistency import guidance_embedding
from fewstep.guidance.described import described
from fewstep.seeding import Generators
from lightning_modules.chains import CHAINS, PLAIN_ODE, Record, chain_of
from lightning_modules.conditioning import in_float32
from lightning_modules.recorded import RecordedRoles
from lightning_modules.steered import TABLE, Steered, write_table
from lightning_modules.steering import Steering


def null_of(backbone: Backbone, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """The null condition; nothing for networks that take no condition at all."""
    try:
        return backbone.null_cond(cond) if cond else {}
    except NotImplementedError:
        return {}


class SteeredRoles(RecordedRoles):
    """Samples with guidance that needs no training, once :meth:`steer` has said how.

    Otherwise sampling is the method's own.
    """

    steered: Steered | None = None
    _steering: Steering | None = None

    def steer(self, steering: Steering) -> None:
        """Steers all sampling from now on."""
        self.steered, self._steering = Steered(steering), steering

    def record(self, role: str) -> Record:
        """What says how a role samples; a derived method samples as the one it comes from."""
        if role == "teacher":
            return PLAIN_ODE
        names = [one.__name__ for one in type(self).__mro__]
        known = next(filter(CHAINS.__contains__, names), names[0])
        return {**self.metadata(), "method": known}

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
        """Turns noise ``(B, ...)`` into samples; see :class:`~lightning_modules.sampling`.

        Raises:
            FewstepError: if guidance diverged; one rank of several leaves that to
                :meth:`check_guidance`, so that the others need not wait for it.
        """
        known = cond or {}
        if self._steering is not None and cond is not None:
            cond = self._steering.for_network(cond, self.student.backbone)
        if self.steered is None:
            return super().sample(noise, cond, num_steps, generator, role, prompt)
        role, steering = self.checked_role(role), self.steered.steering
        target = steering.target_of(known, prompt)
        if prompt is not None and self.companions is not None:
            cond = self.companions.with_prompts(cond or {}, prompt, self.student.backbone)
        network, record = getattr(self, role), self.record(role)
        given = in_float32(cond or {})
        if steering.unconditional:
            given = null_of(network.backbone, given)
        told = record.get("sampling", {}).get("embedded_guidance")
        name = network.backbone.guidance_input
        if told is not None and name is not None:
            size: int = network.backbone.config["guidance_embedding_dim"]
            given[name] = guidance_embedding(noise.new_full((len(noise),), told), size)
        samples = self.steered.sample(
            Guided(network, self.guidance_scale(role), channels=self.guided_channels),
            noise,
            given or None,
            target,
            chain_of(record, network.schedule, num_steps),
            generator,
            (role, num_steps),
            None if self.companions is None else self.companions.codec.to(noise.device),
        )
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not together:
            self.check_guidance()
        return samples

    # ------------------------------------------------------------------ what callbacks ask

    def is_steered(self) -> bool:
        """Whether samples are steered."""
        return self.steered is not None

    @contextmanager
    def sampling_as(self, plain: bool, counted: bool) -> Iterator[None]:
        """Meanwhile samples are not steered if ``plain``, and in no account unless ``counted``."""
        steered = self.steered
        if steered is None:
            yield
            return
        self.steered, steered.counted = (None if plain else steered), counted
        try:
            yield
        finally:
            self.steered, steered.counted = steered, True

    def check_guidance(self) -> None:
        """Raises what went wrong with this rank's samples since it was last asked.

        Raises:
            FewstepError: if guidance diverged.
        """
        steered = self.steered
        if steered is not None and steered.failure is not None:
            failure, steered.failure = steered.failure, None
            raise failure

    def guidance_scale(self, role: str | None = None) -> float:
        """The scale of classifier-free guidance; 1 where the network is given no condition."""
        if self.steered is not None and self.steered.steering.unconditional:
            return 1.0
        return super().guidance_scale(role)

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample; of steered ones as counted, once some were made."""
        found = self.sampling_cost(num_steps, role)
        if not found:
            return super().sampling_evaluations(num_steps, role)
        return int(found["denoiser_evaluations"])

    def sampling_cost(self, num_steps: int, role: str | None = None) -> dict[str, float]:
        """What a steered sample took, as counted; nothing of samples that are not steered."""
        if self.steered is None:
            return {}
        return self.steered.costs.get((self.checked_role(role), num_steps), {})

    def steering_record(self) -> dict[str, Any]:
        """What it is steered by, in plain values; nothing where it is not."""
        return {} if self.steered is None else described(self.steered.steering)

    def guides(self) -> Sequence[nn.Module] | None:
        """The networks that steer; None where nothing does."""
        return None if self.steered is None else self.steered.steering.guides()

    def write_traces(self) -> None:
        """Writes how guidance went, round by round, into the run's folder; a collective."""
        rows = [] if self.steered is None else self.steered.table(self.trainer, self.device)
        if rows and self.trainer.is_global_zero:
            write_table(Path(self.trainer.default_root_dir) / TABLE, rows)
