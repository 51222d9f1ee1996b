"""Training-free guidance (Shen et al., NeurIPS 2024, arXiv 2403.12404) as an experiment.

Nothing is trained: a network that somebody has trained, slow or of few steps, samples with the
guidance that the experiment describes, and is measured. ``fewstep evaluate --steering`` does the
same with any other experiment's run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

import torch

from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from fewstep.guidance.described import described
from fewstep.metrics.fingerprints import fingerprint
from fewstep.networks.loading import (
    METADATA_KEY,
    find_checkpoint,
    read_checkpoint,
)
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder
from lightning_modules.base import FewStepModule
from lightning_modules.chains import PLAIN_ODE, Record, default_steps
from lightning_modules.optimisation import Draws
from lightning_modules.roles import (
    Evaluations,
    TeacherSource,
    Update,
    frozen,
    is_pipeline,
    load_teacher,
)
from lightning_modules.steering import Steering


class TrainingFreeGuidance(FewStepModule):
    """Samples of a trained network, steered without training.

    The network samples as its own method does: a teacher along the ODE, a consistency student by
    jumps and new noise, a phased one from edge to edge, a post-trained one in a jump.

    Args:
        start: the network: a checkpoint, a run's or an experiment's folder, a diffusers pipeline,
            or a factory of a denoiser.
        steering: the guidance, and what it is told; by default there is none, for comparison.
        role: whose weights of a checkpoint; ``ema`` falls back to ``student`` where none were kept.
        sampling_guidance: scale of classifier-free guidance, where steering is not unconditional;
            1 is off.
        step_counts: numbers of sampling steps to measure at; what the network serves by default.
        checkpoint_activations: keep only the blocks' inputs for the gradient through the network.
        frozen_precision: what its weights are kept in.
        pipeline, encoder_precision, offload_encoders, vae_tiling: see
            :class:`~lightning_modules.base.FewStepModule`.
    """

    frozen_roles: tuple[str, ...] = ("student",)

    def __init__(
        self,
        start: TeacherSource,
        steering: Steering | None = None,
        role: Literal["ema", "student"] = "ema",
        sampling_guidance: float = 1.0,
        step_counts: list[int] | None = None,
        checkpoint_activations: bool = False,
        frozen_precision: Literal["float32", "bfloat16"] = "float32",
        pipeline: str | None = None,
        encoder_precision: Literal["float32", "bfloat16", "float16"] = "float32",
        offload_encoders: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        super().__init__(
            ema_decay=None,
            sampling_guidance=sampling_guidance,
            step_counts=step_counts,
            checkpoint_activations=checkpoint_activations,
            frozen_precision=frozen_precision,
            pipeline=pipeline,
            encoder_precision=encoder_precision,
            offload_encoders=offload_encoders,
            vae_tiling=vae_tiling,
        )
        self.make_optimizer = {}
        self.start_source = start
        self.role = role
        self.steer(steering or Steering())

    def build_roles(self) -> None:
        self.student, origin = load_teacher(self.start_source, self.role)
        frozen(self.student)
        planned = any(tensor.is_meta for tensor in self.student.state_dict().values())
        if "sha256" not in origin and not planned:  # a factory's: nothing else tells them apart
            made = {"spec": described(self.student.to_spec()), "weights": fingerprint(self.student)}
            origin["sha256"] = hashlib.sha256(json.dumps(made).encode()).hexdigest()
        self.provenance["start"] = origin

    def record(self, role: str) -> Record:
        """What the network's checkpoint says of its sampling; others follow the ODE."""
        source = self.start_source
        if not isinstance(source, str) or is_pipeline(source):
            return PLAIN_ODE
        if self._start_record is None:
            path = find_checkpoint(source)
            sharded = is_sharded_checkpoint(path)
            self._start_record = (read_remainder if sharded else read_checkpoint)(path)[
                METADATA_KEY
            ]
        return self._start_record

    _start_record: Record | None = None

    def step_counts(self, role: str | None = None) -> list[int]:
        """What was chosen, or what the network serves."""
        return self.measured_steps or default_steps(self.record("student"))

    def steering_record(self) -> dict[str, Any]:
        """With the network that is steered, so that no other's results are taken for its own."""
        start = dict(self.provenance.get("start", {}))
        return {**super().steering_record(), "start": start, "weights": self.role}

    def method_metadata(self) -> dict[str, Any]:
        return {"start": dict(self.record("student")).get("method")}

    def evaluations(self) -> dict[str, Evaluations]:
        """None in training: there is none."""
        return {}

    # ------------------------------------------------------------------ nothing is trained

    def configure_optimizers(self) -> Any:
        """There is nothing to optimise.

        Raises:
            FewstepError: if the run is to train.
        """
        if self.trainer.max_steps != 0:
            raise FewstepError(
                "TrainingFreeGuidance trains nothing, but trainer.max_steps is "
                f"{self.trainer.max_steps}. Set trainer.max_steps: 0; `fewstep fit` then measures."
            )
        return [], []

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """There is nothing to draw."""
        return Draws()

    def updates(self, batch: Batch, draws: Any) -> Iterator[Update]:
        """There is no loss."""
        return iter(())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """There is no loss to validate."""
