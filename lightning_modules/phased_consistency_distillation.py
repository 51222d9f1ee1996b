"""Phased Consistency Models (Wang et al., NeurIPS 2024, arXiv 2405.18407)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from fewstep.contracts import Batch
from fewstep.diffusion import DenoiserLike
from fewstep.diffusion.losses import hinge_discriminator, hinge_generator
from fewstep.errors import FewstepError
from fewstep.networks import FeatureDiscriminator
from fewstep.seeding import Generators
from lightning_modules.chains import phased_chain
from lightning_modules.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDraws,
    Pair,
)
from lightning_modules.roles import Evaluations, TeacherSource, Update


@dataclass(frozen=True)
class PhasedDraws(ConsistencyDraws):
    """Randomness of one step: that of consistency distillation and of the adversarial term.

    ``position (B,)`` in [0, 1) places the discriminator's time inside the phase; two independent
    noises ``(B, ...)`` take the student's and the target's jump there, empty ``(B, 0)`` without
    that term.
    """

    position: Tensor
    fake_noise: Tensor
    real_noise: Tensor


def released_adamw(
    parameters: Iterable[Any],
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.0, 0.999),
    weight_decay: float = 1e-3,
) -> AdamW:
    """The discriminator's optimiser of PCM's released scripts: AdamW without a first moment."""
    return AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


class PhasedConsistencyDistillation(ConsistencyDistillation):
    """PCM: self-consistency within each of ``M`` phases, chained deterministically.

    Two training modes (spec of the paper, section 3.2): a guidance range in the solver, or none
    with ``cond_dropout`` 0.1 and guidance at inference, for which ``num_phases >= 4`` is advised.

    Args:
        teacher: a checkpoint, run or experiment folder, or a factory of a denoiser.
        num_phases: phases ``M``, which is also the number of sampling steps served. One phase is a
            consistency model, which serves more steps too: re-noised between them.
        num_grid_points: solver grid points ``N``. 40 for VP (released code: 50, 40 and 100), so
            that edges of 4 and 8 phases are those of evenly spaced schedulers.
        adversarial_weight: weight of the adversarial consistency term (the paper: 0.1); 0 is off.
        discriminator_optimizer: makes the discriminator's optimiser; by default as released,
            :func:`released_adamw`.
        discriminator_blocks: blocks of the teacher it looks at; all by default.
        heads_per_block, head_width, head_kernel: size of its heads.
        edge_share: share of samples drawn at the phases' upper edges, the only times a sampler
            visits; the rest is uniform over the grid, as all is in the released code.
        alpha_floor: PCM's clip of alpha in the student's jump (0.5 in the appendix), for epsilon
            networks with one or two phases; 0 is off.
        stochasticity: ``1 - r`` of eq. 44 when sampling; 0 is deterministic. Without effect on one
            phase.
        allow_untrained_steps: permit sampling in fewer steps than phases.
        base: options of :class:`ConsistencyDistillation` and of
            :class:`~lightning_modules.base.FewStepModule`.
    """

    def __init__(
        self,
        teacher: TeacherSource,
        num_phases: int = 4,
        num_grid_points: int = 40,
        adversarial_weight: float = 0.0,
        discriminator_optimizer: OptimizerCallable = released_adamw,
        discriminator_blocks: list[str] | None = None,
        heads_per_block: int = 1,
        head_width: int = 64,
        head_kernel: int = 1,
        edge_share: float = 0.0,
        alpha_floor: float = 0.0,
        stochasticity: float = 0.0,
        allow_untrained_steps: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(teacher=teacher, num_grid_points=num_grid_points, **base)
        self.num_phases = num_phases
        self.adversarial_weight = adversarial_weight
        self.discriminator_blocks = discriminator_blocks
        self.head_options = {
            "heads_per_block": heads_per_block,
            "width": head_width,
            "kernel_size": head_kernel,
        }
        self.edge_share = edge_share
        self.alpha_floor = alpha_floor
        self.stochasticity = stochasticity
        self.allow_untrained_steps = allow_untrained_steps
        if adversarial_weight:
            self.make_optimizer["discriminator"] = discriminator_optimizer
        if self.boundary == "lcm":
            raise FewstepError("boundary: lcm ends at clean data and has no phases; use jump.")

    def build_roles(self) -> None:
        super().build_roles()
        self._check_alpha_floor()
        self.student.alpha_floor = self.alpha_floor
        if self.adversarial_weight:
            self.discriminator = FeatureDiscriminator(
                self.teacher.backbone, self.discriminator_blocks, **self.head_options
            )

    def _check_alpha_floor(self) -> None:
        """The floor breaks the boundary condition at every edge whose alpha lies below it."""
        if not self.alpha_floor:
            return
        edges = self.phases.edges.home[:-1]  # all but pure noise, which is no jump's target
        if self.teacher.prediction_type != "epsilon":
            raise FewstepError(
                f"alpha_floor is for epsilon networks; the teacher predicts "
                f"{self.teacher.prediction_type} and needs none."
            )
        lowest = float(self.schedule.alpha(edges).min())
        if lowest < self.alpha_floor:
            raise FewstepError(
                f"alpha_floor {self.alpha_floor} exceeds alpha = {lowest:.3f} at a phase's edge, "
                "where the student could no longer be the identity. Use it with one or two phases."
            )

    # ------------------------------------------------------------------ the step

    def draw(self, batch: Batch, generator: torch.Generator) -> PhasedDraws:
        x0, device = batch["sample"], generator.device
        common = vars(super().draw(batch, generator))
        if self.edge_share:
            common["index"] = self._favour_edges(common["index"], generator)
        shape = x0.shape if self.adversarial_weight else (len(x0), 0)
        return PhasedDraws(
            **common,
            position=torch.rand(len(x0), generator=generator, device=device),
            fake_noise=torch.randn(shape, generator=generator, device=device),
            real_noise=torch.randn(shape, generator=generator, device=device),
        )

    def _favour_edges(self, index: Tensor, generator: torch.Generator) -> Tensor:
        shape, device = index.shape, generator.device
        phase = torch.randint(self.num_phases, shape, generator=generator, device=device)
        chosen = torch.rand(shape, generator=generator, device=device) < self.edge_share
        return torch.where(chosen, self.phases.last_index.on(device)[phase], index)

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        assert isinstance(draws, PhasedDraws)
        pair = self.pair(batch, draws)
        consistency = self.consistency_loss(pair)
        if not self.adversarial_weight:
            yield Update("student", consistency, {"consistency": consistency})
            return

        # Fake and real are the student's and the target's jump to the same edge, noised from there
        # to the same time inside the phase: once self-consistency holds they have the same law.
        a = self._time_in_phase(draws)
        fake = self.schedule.renoise(pair.student, pair.s, a, draws.fake_noise)
        fake_features = self.discriminator.features(self.teacher, fake, a, pair.cond)
        adversarial = hinge_generator(self.discriminator.score(fake_features))
        yield Update(
            "student",
            consistency + self.adversarial_weight * adversarial,
            {"consistency": consistency, "adversarial": adversarial},
        )
        yield self._discriminator_update(pair, draws, a, [f.detach() for f in fake_features])

    def _discriminator_update(
        self, pair: Pair, draws: PhasedDraws, a: Tensor, fake_features: list[Tensor]
    ) -> Update:
        """Tells target from student on the features already computed for the student's turn."""
        with torch.no_grad():
            real = self.schedule.renoise(pair.target, pair.s, a, draws.real_noise)
            real_features = self.discriminator.features(self.teacher, real, a, pair.cond)
        real_scores = self.discriminator.score(real_features)
        fake_scores = self.discriminator.score(fake_features)
        loss = hinge_discriminator(real_scores, fake_scores)
        return Update("discriminator", loss, {"discriminator": loss})

    def _time_in_phase(self, draws: PhasedDraws) -> Tensor:
        device = draws.index.device
        low = self.phases.edge_of.on(device)[draws.index]
        high = self.phases.upper_edge_of.on(device)[draws.index]
        return self.schedule.time_between(low, high, draws.position)

    # ------------------------------------------------------------------ sampling and the record

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators,
    ) -> Tensor:
        """Chains the jumps from edge to edge, at the very edges the student was trained on.

        With one phase and several steps, by consistency sampling: see
        :func:`~lightning_modules.chains.phased_chain`.
        """
        untrained = self.allow_untrained_steps
        share = self.stochasticity
        chain = phased_chain(self.phases, self.schedule, num_steps, share, untrained)
        return chain.sample(denoiser, noise, cond, generator)

    def method_metadata(self) -> dict[str, Any]:
        metadata = super().method_metadata()
        metadata["sampling"]["stochasticity"] = self.stochasticity
        if self.allow_untrained_steps:
            metadata["sampling"]["allow_untrained_steps"] = True
        return metadata

    def step_counts(self, role: str | None = None) -> list[int]:
        """As many steps as phases, unless ``step_counts`` says more (for one phase)."""
        return self.measured_steps or [self.num_phases]

    def evaluations(self) -> dict[str, Evaluations]:
        counts = super().evaluations()
        if self.adversarial_weight:
            features = Evaluations(counts["teacher"].forward + 2, backward=1)
            counts["teacher"] = features
            counts["discriminator"] = Evaluations(forward=3, backward=2)
        return counts
