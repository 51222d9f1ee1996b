"""Consistency distillation (CM, LCM): one network that jumps to the trajectory's end.

Song et al. 2023 (consistency models), Luo et al. 2023 (latent consistency models); the baseline of
Phased Consistency Models. Also the common ground of its successor in
:mod:`lightning_modules.phased_consistency_distillation`, of which it is the case of one phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.diffusion import (
    Cond,
    Denoiser,
    DenoiserLike,
    PhaseSchedule,
    Prediction,
    TimeGrid,
)
from fewstep.diffusion.consistency import guidance_embedding, lcm_output
from fewstep.diffusion.losses import DistanceName, distance
from fewstep.diffusion.tables import expand_to
from fewstep.errors import FewstepError
from fewstep.seeding import Generators
from lightning_modules.base import FewStepModule
from lightning_modules.chains import consistency_chain
from lightning_modules.conditioning import drop_cond
from lightning_modules.optimisation import Draws
from lightning_modules.roles import Evaluations, TeacherSource, Update, load_teacher

MIN_JUMP_LENGTH = 1e-3  # keeps a jump of length zero (a grid point on its own edge) finite


@dataclass(frozen=True)
class ConsistencyDraws(Draws):
    """Randomness of one step.

    ``index (B,)`` on the grid, ``noise (B, ...)``, guidance scale ``(B,)``, dropped conditions
    ``(B,)``.
    """

    index: Tensor
    noise: Tensor
    guidance: Tensor
    dropped: Tensor


class Pair(NamedTuple):
    """The student's jump from ``t (B,)`` and the target it must match, both at edge ``s (B,)``."""

    student: Tensor
    target: Tensor
    t: Tensor
    s: Tensor
    cond: dict[str, Tensor]


class ConsistencyDistillation(FewStepModule):
    """CM and LCM distillation.

    Args:
        teacher: a checkpoint, run or experiment folder, or a factory of a denoiser.
        num_grid_points: solver grid points ``N``; the released LCM and PCM use 50 for SD1.5.
        solver_substeps: teacher steps from one grid point to the next. More make a coarse grid as
            exact as a fine one, and on a coarse grid a student learns from fewer generations of
            its own targets; the released code uses 1.
        guidance_range: interval of the guidance scale in the teacher's solver, drawn for each
            sample (the papers' ``w`` plus one); null uses no guidance there.
        cond_dropout: share of samples distilled without their condition.
        target_network: ``student`` (stop-gradient) or ``ema``.
        loss: ``huber`` (pseudo-Huber) or ``l2``.
        huber_c: constant of the pseudo-Huber distance.
        weighting: ``jump`` compares where jumps end, as the released LCM and PCM code does;
            ``velocity`` divides both ends by the length of the jump, which compares the mean
            velocities they imply. That gives short jumps, from whose targets all others are
            learnt, their full weight, and lets training go in far fewer, larger updates.
        boundary: ``jump`` maps along the predicted line to the trajectory's end; ``lcm`` uses
            LCM's ``c_skip`` and ``c_out``.
        guidance_embedding: tell the student which guidance scale its target used (LCM's
            w-embedding). Needs a U-Net, or a backbone with such an input; a U-Net without it gets
            one of ``guidance_embedding_dim``, which a LoRA adapts too.
        guidance_embedding_dim: size of that input where it is new (LCM: 256).
        base: options of :class:`~lightning_modules.base.FewStepModule`.
    """

    frozen_roles: tuple[str, ...] = ("teacher",)

    def __init__(
        self,
        teacher: TeacherSource,
        num_grid_points: int = 50,
        solver_substeps: int = 1,
        guidance_range: tuple[float, float] | None = None,
        cond_dropout: float = 0.0,
        target_network: Literal["student", "ema"] = "student",
        loss: DistanceName = "huber",
        huber_c: float = 1e-3,
        weighting: Literal["jump", "velocity"] = "jump",
        boundary: Literal["jump", "lcm"] = "jump",
        guidance_embedding: bool = False,
        guidance_embedding_dim: int = 256,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.teacher_source = teacher
        self.num_grid_points = num_grid_points
        self.solver_substeps = solver_substeps
        self.guidance_range = guidance_range
        self.cond_dropout = cond_dropout
        self.target_network = target_network
        self.distance = distance(loss, huber_c)
        self.weighting = weighting
        self.boundary = boundary
        self.embed_guidance = guidance_embedding
        self.guidance_embedding_dim = guidance_embedding_dim
        self.num_phases = 1
        if target_network == "ema" and self.ema_decay is None:
            raise FewstepError("target_network: ema needs an ema_decay (LCM uses 0.95).")

    def build_roles(self) -> None:
        self.teacher, self.provenance["teacher"] = load_teacher(self.teacher_source)
        if self.embed_guidance:
            # The teacher is never told anything through it; the student starts with it.
            self.teacher.backbone.add_guidance_input(self.guidance_embedding_dim)
        self.start_student(self.teacher)
        self.schedule = self.teacher.schedule
        grid = TimeGrid.uniform(self.schedule, self.num_grid_points)
        self.phases = PhaseSchedule(grid, self.num_phases)
        self.solver_path = grid.solver_path(self.schedule, self.solver_substeps)

    # ------------------------------------------------------------------ the step

    def draw(self, batch: Batch, generator: torch.Generator) -> ConsistencyDraws:
        x0, device = batch["sample"], generator.device
        size = len(x0)
        low, high = self.guidance_range or (1.0, 1.0)
        uniform = torch.rand(size, generator=generator, device=device)
        return ConsistencyDraws(
            index=torch.randint(len(self.phases.grid), (size,), generator=generator, device=device),
            noise=torch.randn(x0.shape, generator=generator, device=device),
            guidance=low + (high - low) * uniform,
            dropped=torch.rand(size, generator=generator, device=device) < self.cond_dropout,
        )

    def pair(self, batch: Batch, draws: ConsistencyDraws) -> Pair:
        """The student's jump from ``t_{n+1}`` and, from the teacher's step to ``t_n``, its target.

        Both end at the edge of the phase that ``t_{n+1}`` lies in (PCM, eq. 5); for one phase that
        is the trajectory's end.
        """
        index, x0 = draws.index, batch["sample"]
        t = self.phases.grid.times.on(index.device)[index]
        previous = self.phases.grid.previous.on(index.device)[index]
        s = self.phases.edge_of.on(index.device)[index]
        cond = drop_cond(self.student.backbone, batch["cond"], draws.dropped)
        student_cond = self._with_guidance(cond, draws.guidance)
        x_t = self.schedule.add_noise(x0, draws.noise, t)

        with torch.no_grad():
            x_previous = self._solve(x_t, draws, cond)
            target = self.consistency(self._target(), x_previous, previous, s, student_cond)
            # Already at the edge: there is nothing left to jump.
            target = torch.where(expand_to(previous == s, target), x_previous, target)
        return Pair(self.consistency(self.student, x_t, t, s, student_cond), target, t, s, cond)

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        pair = self.pair(batch, draws)
        loss = self.consistency_loss(pair)
        yield Update("student", loss, {"consistency": loss})

    def _solve(self, x_t: Tensor, draws: ConsistencyDraws, cond: Cond) -> Tensor:
        """The teacher's steps from each sample's grid point to the previous one."""
        guidance = 1.0 if self.guidance_range is None else draws.guidance
        path = self.solver_path.on(x_t.device)[draws.index].unbind(1)
        for start, end in pairwise(path):
            x_t = self.schedule.jump(self.teacher.guided(x_t, start, cond, guidance), end)
        return x_t

    def consistency_loss(self, pair: Pair) -> Tensor:
        """Distance of the student's jump from its target, in the chosen weighting."""
        if self.weighting == "jump":
            return self.distance(pair.student, pair.target)
        length = self.schedule.jump_length(pair.t, pair.s).clamp_min(MIN_JUMP_LENGTH)
        unit = expand_to(length, pair.target).to(pair.target.dtype)
        return self.distance(pair.student / unit, pair.target / unit)

    def consistency(
        self, network: DenoiserLike, x: Tensor, t: Tensor, s: Tensor, cond: Cond
    ) -> Tensor:
        """The consistency function: where the trajectory through ``(x, t)`` is at ``s``."""
        prediction: Prediction = network(x, t, cond)
        if self.boundary == "lcm":
            return lcm_output(prediction, x, t)
        return self.schedule.jump(prediction, s)

    def _target(self) -> Denoiser:
        if self.target_network == "ema":
            assert self.ema is not None
            return self.ema
        return self.student

    def _with_guidance(self, cond: dict[str, Tensor], guidance: Tensor) -> dict[str, Tensor]:
        name = self.student.backbone.guidance_input
        if not self.embed_guidance or name is None:
            return cond
        dim: int = self.student.backbone.config["guidance_embedding_dim"]
        return {**cond, name: guidance_embedding(guidance, dim)}

    # ------------------------------------------------------------------ sampling and the record

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators,
    ) -> Tensor:
        """Multistep consistency sampling over evenly spaced grid points."""
        chain = consistency_chain(self.phases, self.boundary, self.schedule, num_steps)
        if self.embed_guidance:
            guidance = noise.new_full((len(noise),), self._embedded_guidance())
            cond = self._with_guidance(cond or {}, guidance)
        return chain.sample(denoiser, noise, cond, generator)

    def _embedded_guidance(self) -> float:
        """What the student is told when sampling: the middle of the range it was trained on."""
        return sum(self.guidance_range or (1, 1)) / 2

    def guidance_scale(self, role: str | None = None) -> float:
        """The teacher samples with the guidance that its solver teaches."""
        if role == "teacher" and self.guidance_range is not None:
            return sum(self.guidance_range) / 2
        return self.sampling_guidance

    def method_metadata(self) -> dict[str, Any]:
        sampling: dict[str, Any] = {"guidance_scale": self.sampling_guidance}
        if self.embed_guidance:
            sampling["embedded_guidance"] = self._embedded_guidance()
        config = self.phases.to_config()
        return {"phases": config, "boundary": self.boundary, "sampling": sampling}

    def evaluations(self) -> dict[str, Evaluations]:
        target = Evaluations(forward=1)
        solver = self.solver_substeps * (1 if self.guidance_range is None else 2)
        counts = {
            "teacher": Evaluations(forward=solver),
            "student": Evaluations(forward=1, backward=1),
        }
        if self.target_network == "ema":
            return {**counts, "ema": target}
        return {**counts, "student": Evaluations(forward=2, backward=1)}
