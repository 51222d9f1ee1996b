"""What is compared: fewstep's methods in Lightning, and a plain loop with torch's own wrappers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fewstep.batches import in_shape_of
from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import DiT
from fewstep.seeding import torch_generator
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
)
from lightning_modules.optimisation import BLOCK, in_blocks
from lightning_modules.parallel import ReplicatedStrategy, ShardedStrategy
from lightning_modules.phased_consistency_distillation import PhasedDraws
from lightning_modules.roles import run_seed
from lightning_modules.whole import WholeCheckpointIO
from scripts.benchmark_step import GUIDANCE, Step, straightforward_step

Strategy = Literal["single", "ddp", "fsdp2"]
Method = Literal["teacher", "lcm", "pcm", "pcm_adversarial"]
Precision = Literal["32-true", "bf16-mixed"]
COUNTERPART: Method = "pcm"  # the method that the plain loop is written for
CHANNELS, CLASSES = 4, 10
# An eps that keeps AdamW from turning the rounding of tiny gradients into whole steps, so that
# both sides can be seen to compute the same weights.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-5, eps=1e-6)
PREPARED = 8  # different batches; making them is no part of a step


@dataclass(frozen=True)
class Settings:
    """The size of what is measured.

    Attributes:
        device: ``cpu`` or ``cuda``.
        ranks: processes of ``ddp`` and ``fsdp2``.
        width, layers: of the DiT.
        size: height and width of a latent.
        batch: samples a rank.
        blocks: timed blocks of each side.
        steps: steps a block.
        threads: CPU threads of each rank's torch; 0 divides the cores among the ranks.
    """

    device: str = "cpu"
    ranks: int = 2
    width: int = 256
    layers: int = 6
    size: int = 32
    batch: int = 2
    blocks: int = 5
    steps: int = 1
    threads: int = 0


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        detailed: measure weight averaging and checkpoints, and plan its memory, too.
    """

    strategy: Strategy
    method: Method
    precision: Precision = "32-true"
    compiled: bool = False
    detailed: bool = False

    def ranks(self, settings: Settings) -> int:
        """Its number of processes."""
        return 1 if self.strategy == "single" else settings.ranks


def network(settings: Settings) -> DiT:
    """A DiT of the asked size with the same random weights wherever it is made."""
    heads, head_dim = settings.width // 64 or 1, min(64, settings.width)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        made = DiT(settings.size, CHANNELS, 2, settings.layers, heads, head_dim, CLASSES)
        for parameter in made.parameters():
            # A DiT begins with zeros, behind which gradients are zero too.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made


def _denoiser(settings: Settings) -> Denoiser:
    return Denoiser(network(settings), VPSchedule(), "v_prediction")


def make_method(case: Case, settings: Settings) -> FewStepModule:
    """A method whose teacher is random."""
    options: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "ema_warmup": False,
        "compile_blocks": case.compiled,
    }
    if case.method == "teacher":
        backbone = partial(network, settings)
        return DiffusionTraining(backbone, VPSchedule(), "v_prediction", **options)
    teacher = partial(_denoiser, settings)
    options["guidance_range"] = GUIDANCE
    if case.method == "lcm":
        return ConsistencyDistillation(teacher, 40, **options)
    if case.method == "pcm_adversarial":
        options |= {"adversarial_weight": 0.1, "discriminator_optimizer": OPTIMIZER}
    return PhasedConsistencyDistillation(teacher, 4, 40, **options)


class RandomData(pl.LightningDataModule):
    """Noise with labels, a few batches over and over, different on every rank."""

    def __init__(self, settings: Settings, rank: int) -> None:
        super().__init__()
        self.batch_size = settings.batch
        draws = torch_generator(0, "benchmark", rank)
        shape = (settings.batch, CHANNELS, settings.size, settings.size)
        self.prepared: list[Batch] = [
            {
                "sample": torch.randn(shape, generator=draws),
                "cond": {"class_labels": torch.randint(CLASSES, shape[:1], generator=draws)},
                "key": [""] * settings.batch,
            }
            for _ in range(PREPARED)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self.prepared)

    def train_dataloader(self) -> RandomData:
        """Lightning takes any iterable."""
        return self


def trainer_of(
    case: Case, settings: Settings, updates: int, folder: Path, *callbacks: pl.Callback
) -> pl.Trainer:
    """A Trainer on this rank, as `fewstep fit` would set it up."""
    strategies: dict[Strategy, Any] = {"ddp": ReplicatedStrategy, "fsdp2": ShardedStrategy}
    single = case.strategy == "single"
    plugins: list[Any] = [LightningEnvironment() if single else TorchElasticEnvironment()]
    if case.strategy != "fsdp2":
        plugins.append(WholeCheckpointIO())
    return pl.Trainer(
        accelerator=settings.device,
        devices=case.ranks(settings),
        strategy="auto" if single else strategies[case.strategy](),
        precision=case.precision,
        plugins=plugins,
        max_steps=updates,
        default_root_dir=folder,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


# ---------------------------------------------------------------------- the straightforward way


def plain_module(
    case: Case, settings: Settings, device: torch.device
) -> PhasedConsistencyDistillation:
    """The same roles without a trainer: the student in torch's own wrapper, the teacher whole.

    Of the method only its networks, phases and draws are used.
    """
    made = make_method(replace(case, method=COUNTERPART, compiled=False), settings)
    module = cast(PhasedConsistencyDistillation, made)
    module.configure_model()
    module.to(device)
    assert module.ema is not None
    if case.strategy == "ddp":
        ids = [device] if device.type == "cuda" else None
        module.register_module("student", DistributedDataParallel(module.student, ids))
    elif case.strategy == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for role in (module.student, module.ema):
            for name in role.backbone.shard_units:
                fully_shard(role.backbone.get_submodule(name), mesh=mesh)
            fully_shard(role, mesh=mesh)
    return module


def plain_step(module: PhasedConsistencyDistillation, case: Case, rank: int) -> Step:
    """A step of the hand-written loop on what :func:`plain_module` made."""

    def draw(batch: Batch, update: int) -> PhasedDraws:
        size, shape = len(batch["sample"]), in_shape_of(batch, BLOCK)

        def block(number: int) -> PhasedDraws:
            seeds = run_seed(), "train", update, number
            return module.draw(shape, torch_generator(*seeds, device=module.device))

        return in_blocks(range(rank * size, (rank + 1) * size), block)

    low = torch.bfloat16 if case.precision == "bf16-mixed" else None
    return straightforward_step(module, draw, low)


def place(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    cond = {name: value.to(device) for name, value in batch["cond"].items()}
    return {"sample": batch["sample"].to(device), "cond": cond, "key": batch["key"]}
