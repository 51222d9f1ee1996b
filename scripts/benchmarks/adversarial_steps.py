"""A step of adversarial PCM with a LoRA student: ours, and the same mathematics written plainly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, PhaseSchedule, TimeGrid
from fewstep.diffusion.losses import hinge_discriminator, hinge_generator, pseudo_huber
from fewstep.diffusion.tables import expand_to
from fewstep.networks import FeatureDiscriminator, ema_update
from fewstep.networks.lora import LoRA
from fewstep.networks.lora_targets import find_targets, inner_network
from lightning_modules import PhasedConsistencyDistillation
from lightning_modules.finite import neutralise, skip_unless
from lightning_modules.phased_consistency_distillation import PhasedDraws
from lightning_modules.preparation import compile_blocks, keep_in
from lightning_modules.roles import frozen
from scripts.benchmark_step import EMA_DECAY
from scripts.benchmarks.adversarial import GRID_POINTS, GUIDANCE, Settings, network, random_draws
from scripts.benchmarks.contestants import OPTIMIZER

PHASES = 4
ADVERSARIAL_WEIGHT = 0.1
CLIP = 1.0
PREPARED = 8  # different draws; making them is no part of a step


class Contestant:
    """One side of the comparison: its networks, and a training step of them.

    Args:
        settings: the size.

    Attributes:
        teacher, student: denoisers, which may share a network.
        discriminator: heads over the frozen network's features.
        optimizers: by role.
    """

    teacher: Denoiser
    student: Denoiser
    discriminator: FeatureDiscriminator
    optimizers: dict[str, torch.optim.Optimizer]

    def __init__(self, settings: Settings) -> None:
        self.draws = [random_draws(settings, update) for update in range(PREPARED)]
        low = settings.dtype == "bf16"
        self.autocast = partial(torch.autocast, settings.device, torch.bfloat16, enabled=low)

    def step(self, batch: Batch, update: int) -> None:
        """One update of the student and one of the discriminator."""
        raise NotImplementedError

    def backward(self, loss: Tensor, parameters: list[nn.Parameter] | None = None) -> None:
        """Gradients of a loss; with ``parameters``, of these alone."""
        loss.backward(inputs=parameters)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of roles with an optimiser."""
        roles: dict[str, nn.Module] = {
            "student": self.student,
            "discriminator": self.discriminator,
        }
        return {n: [p for p in role.parameters() if p.requires_grad] for n, role in roles.items()}

    def averaged(self) -> list[Tensor]:
        """The student's average."""
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """All weights and optimiser states, each once."""
        modules = (self.teacher, self.student, self.discriminator)
        found = [p for module in modules for p in module.parameters()]
        states = [s for o in self.optimizers.values() for s in o.state.values()]
        tensors = [*found, *self.averaged(), *(v for s in states for v in s.values())]
        return list({id(tensor): tensor for tensor in tensors}.values())


class Ours(Contestant):
    """The step that fewstep trains with, without a trainer around it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.module = PhasedConsistencyDistillation(
            partial(network, settings),
            PHASES,
            GRID_POINTS,
            adversarial_weight=ADVERSARIAL_WEIGHT,
            discriminator_optimizer=OPTIMIZER,
            head_width=settings.head_width,
            head_kernel=settings.head_kernel,
            guidance_range=GUIDANCE,
            optimizer=OPTIMIZER,
            lora=LoRA(rank=settings.rank),
            ema_decay=EMA_DECAY,
            frozen_precision="bfloat16" if settings.dtype == "bf16" else "float32",
            compile_blocks=settings.compiled,
            checkpoint_activations=settings.checkpoint,
        )
        self.module.configure_model()
        self.module.to(settings.device).train()
        self.teacher, self.student = self.module.teacher, self.module.student
        self.discriminator = self.module.discriminator
        self.optimizers = {role: OPTIMIZER(found) for role, found in self.trained().items()}

    def step(self, batch: Batch, update: int) -> None:
        trained = self.trained()
        with self.autocast():
            for found in self.module.updates(batch, self.draws[update % PREPARED]):
                self.backward(found.loss, trained[found.role])
        for role, parameters in trained.items():
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            finite = neutralise([p.grad for p in parameters if p.grad is not None], norm)
            skip_unless(finite, self.optimizers[role])
            self.optimizers[role].step()
            self.optimizers[role].zero_grad(set_to_none=True)
        assert self.module.ema is not None
        ema_update(self.module.ema, self.student, EMA_DECAY)

    def averaged(self) -> list[Tensor]:
        assert self.module.ema is not None
        return list(self.module.ema.parameters())


# ---------------------------------------------------------------------- the straightforward way


@dataclass(frozen=True)
class Jumps:
    """The student's jump from ``t`` and its target, both ``(B, ...)`` at the edge ``s (B,)``.

    ``a (B,)`` is the time inside the phase to which both are noised for the discriminator.
    """

    student: Tensor
    target: Tensor
    s: Tensor
    a: Tensor


class Straightforward(Contestant):
    """The same mathematics, written as public scripts of LCM and PCM write it.

    The student has a base of its own; guidance takes two passes; each loss extracts the features
    it needs; the average is a loop over parameters; losses are read on the host.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        low = settings.dtype == "bf16" and settings.plain_bases == "bf16"
        kept = torch.bfloat16 if low else torch.float32
        self.teacher, self.student = network(settings), network(settings)
        adapt(self.student, settings.rank, kept)
        keep_in(frozen(self.teacher), kept)
        self.discriminator = FeatureDiscriminator(
            self.teacher.backbone, None, 1, settings.head_width, settings.head_kernel
        )
        for role in (self.teacher, self.student, self.discriminator):
            role.to(settings.device)
        for base in (self.teacher, self.student):
            if settings.checkpoint:
                inner_network(base.backbone).enable_gradient_checkpointing()  # type: ignore[operator]
            if settings.compiled:
                compile_blocks(base)
        self.phases = PhaseSchedule(TimeGrid.uniform(self.teacher.schedule, GRID_POINTS), PHASES)
        self.average: list[Tensor] = [p.detach().clone() for p in self.trained()["student"]]
        self.optimizers = {role: OPTIMIZER(found) for role, found in self.trained().items()}

    def step(self, batch: Batch, update: int) -> None:
        draws = self.draws[update % PREPARED]
        with self.autocast():
            jumps = self.jumps(batch, draws)
            loss = self.student_loss(jumps, batch, draws)
        self.backward(loss)
        self.update("student")
        with self.autocast():
            judged = self.discriminator_loss(jumps, batch, draws)
        self._finish(loss, judged)

    def alternating_step(self, batch: Batch, update: int) -> None:
        """As PCM's released script: each of the two takes its turn from the teacher's step on."""
        draws = self.draws[update % PREPARED]
        with self.autocast():
            loss = self.student_loss(self.jumps(batch, draws), batch, draws)
        self.backward(loss)
        self.update("student")
        with self.autocast():
            with torch.no_grad():
                jumps = self.jumps(batch, draws)
            judged = self.discriminator_loss(jumps, batch, draws)
        self._finish(loss, judged)

    def _finish(self, loss: Tensor, judged: Tensor) -> None:
        self.optimizers["discriminator"].zero_grad()  # what the student's loss left there
        self.backward(judged)
        self.update("discriminator")
        with torch.no_grad():
            for kept, current in zip(self.average, self.trained()["student"], strict=True):
                kept.mul_(EMA_DECAY).add_(current, alpha=1 - EMA_DECAY)
        loss.item()
        judged.item()

    def update(self, role: str) -> None:
        """Clips and steps one role."""
        nn.utils.clip_grad_norm_(self.trained()[role], CLIP)
        self.optimizers[role].step()
        self.optimizers[role].zero_grad()

    def jumps(self, batch: Batch, draws: PhasedDraws) -> Jumps:
        """The teacher's step with guidance, and the student's jumps from both of its ends."""
        schedule, x0, cond = self.teacher.schedule, batch["sample"], batch["cond"]
        tables = (self.phases.grid.times, self.phases.grid.previous)
        edges = (self.phases.edge_of, self.phases.upper_edge_of)
        t, p, s, end = (table.on(x0.device)[draws.index] for table in (*tables, *edges))
        x_t = schedule.add_noise(x0, draws.noise, t)
        with torch.no_grad():
            conditional = schedule.jump(self.teacher(x_t, t, cond), p)
            null = self.teacher.backbone.null_cond(cond)
            unconditional = schedule.jump(self.teacher(x_t, t, null), p)
            guidance = expand_to(draws.guidance, x0)
            x_p = unconditional + guidance * (conditional - unconditional)
            target = schedule.jump(self.student(x_p, p, cond), s)
            target = torch.where(expand_to(p == s, target), x_p, target)
        jump = schedule.jump(self.student(x_t, t, cond), s)
        return Jumps(jump, target, s, schedule.time_between(s, end, draws.position))

    def student_loss(self, jumps: Jumps, batch: Batch, draws: PhasedDraws) -> Tensor:
        """Consistency, and that the discriminator takes the student's jump for a target."""
        fake = self._scores(jumps.student, jumps, draws.fake_noise, batch)
        consistency = pseudo_huber(jumps.student, jumps.target)
        return consistency + ADVERSARIAL_WEIGHT * hinge_generator(fake)

    def discriminator_loss(self, jumps: Jumps, batch: Batch, draws: PhasedDraws) -> Tensor:
        """That it tells targets from the student's jumps, both looked at anew."""
        fake = self._scores(jumps.student.detach(), jumps, draws.fake_noise, batch)
        real = self._scores(jumps.target, jumps, draws.real_noise, batch)
        return hinge_discriminator(real, fake)

    def _scores(self, x: Tensor, jumps: Jumps, noise: Tensor, batch: Batch) -> list[Tensor]:
        x_a = self.teacher.schedule.renoise(x, jumps.s, jumps.a, noise)
        features = self.discriminator.features(self.teacher, x_a, jumps.a, batch["cond"])
        return self.discriminator.score(features)

    def averaged(self) -> list[Tensor]:
        return self.average


def adapt(student: Denoiser, rank: int, kept: torch.dtype) -> None:
    """Freezes a network and adds a trainable LoRA in float32 to it, with peft alone."""
    import peft  # an extra; our own side explains its lack

    inner = inner_network(student.backbone)
    names = find_targets(inner, None)[1]
    keep_in(frozen(student), kept)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    peft.inject_adapter_in_model(config, inner)
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    student.train()
