"""Short training runs of every method, on one device or on several gloo ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from callbacks import Checkpoints
from fewstep.batches import rows_of
from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import DiT, VideoDiT
from fewstep.networks.frames import ClassCondition, ConvolutionFeatures
from fewstep.networks.gates import ResidualGates
from lightning_modules import (
    AdversarialPostTraining,
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    FrameAdversary,
    MotionConsistencyDistillation,
    PhasedConsistencyDistillation,
)
from lightning_modules.parallel import ReplicatedStrategy, ShardedStrategy
from lightning_modules.whole import WholeCheckpointIO

from ranks import run_ranks

GLOBAL_BATCH = 8
Network = TypeVar("Network", bound=torch.nn.Module)
Run = tuple[dict[str, Tensor], list[dict[str, float]], bool]  # as :func:`train` gives it
# An eps that keeps AdamW from turning the rounding of tiny gradients into whole steps.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
GATES = ResidualGates(alpha_shape="channel", init="ode")
OPTIONS: dict[str, Any] = {"optimizer": OPTIMIZER, "ema_decay": 0.9, "warmup_updates": 3}


def awake(make: Callable[[], Network]) -> Network:
    """A network that is the same each time, without the zeros that it starts with."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = make()
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return made


def network(**options: Any) -> DiT:
    return awake(partial(DiT, 8, 1, num_layers=2, num_heads=2, head_dim=8, **options))


def teacher() -> Denoiser:
    return Denoiser(network(), VPSchedule(), "v_prediction")


def video_teacher() -> Denoiser:
    make = partial(VideoDiT, 8, 3, 1, patch_size=4, num_layers=2, num_heads=2, head_dim=12)
    return Denoiser(awake(make), VPSchedule(), "v_prediction")


class Motion(MotionConsistencyDistillation):
    """With the same heads wherever they are built."""

    def build_roles(self) -> None:
        torch.manual_seed(3)
        super().build_roles()


def adversary(**options: Any) -> FrameAdversary:
    given = {"condition": ClassCondition(), "kernel": 3, "width": 8, **options}
    return FrameAdversary(ConvolutionFeatures(widths=[4, 8]), **given)


class Phased(PhasedConsistencyDistillation):
    """With the same discriminator wherever it is built."""

    def build_roles(self) -> None:
        torch.manual_seed(3)
        super().build_roles()


class PostTraining(AdversarialPostTraining):
    """With the same heads wherever they are built."""

    def build_roles(self) -> None:
        torch.manual_seed(3)
        super().build_roles()


def method(name: str, **chosen: Any) -> FewStepModule:
    options = {**OPTIONS, **chosen}
    if name in ("teacher", "variances"):
        told = name == "variances"
        given = {"sampler": "ddpm" if told else "ode", **options}
        made = partial(network, learned_variance=told)
        return DiffusionTraining(made, VPSchedule(), "v_prediction", **given)
    if name == "gated":
        return method("teacher", **{"gates": GATES, "gates_lr": 2.0, **options})
    if name == "mcm":
        judge = adversary(real="images", penalty=0.1)
        optimizers = {"motion_optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER}
        return Motion(video_teacher, adversary=judge, num_grid_points=20, **optimizers, **options)
    if name == "apt":
        rms_prop = partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, eps=1e-4)
        given = {"loss": "relativistic", "sigma": 0.1, "discriminator_optimizer": rms_prop}
        return PostTraining(teacher, teacher, **{**given, **options})
    if name == "lcm":
        return ConsistencyDistillation(teacher, 20, guidance_range=(2.0, 3.0), **options)
    return Phased(
        teacher,
        2,
        20,
        adversarial_weight=0.5 if name == "adversarial" else 0.0,
        discriminator_optimizer=OPTIMIZER,
        **options,
    )


class Stream(IterableDataset[Any]):
    """This rank's rows of global batches that do not depend on the number of ranks."""

    def __init__(self, data: Data, rank: int, world: int, start: int) -> None:
        self.rows = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
        self.start = start
        self.shape = data.shape

    def __iter__(self) -> Any:
        number = self.start
        while True:
            draws = torch.Generator().manual_seed(number)
            sample = torch.randn(GLOBAL_BATCH, *self.shape, generator=draws)
            labels = torch.randint(10, (GLOBAL_BATCH,), generator=draws)
            whole: Batch = {
                "sample": sample,
                "cond": {"class_labels": labels},
                "key": [str(number)] * GLOBAL_BATCH,
            }
            if len(self.shape) == 4:  # two pictures a video
                pictures = torch.randn(2 * GLOBAL_BATCH, 1, 8, 8, generator=draws)
                cond = {"class_labels": torch.randint(10, (2 * GLOBAL_BATCH,), generator=draws)}
                keys = [str(number)] * 2 * GLOBAL_BATCH
                whole["images"] = {"sample": pictures, "cond": cond, "key": keys}
            yield rows_of(whole, self.rows)
            number += 1


class Data(pl.LightningDataModule):
    def __init__(self, shape: tuple[int, ...] = (1, 8, 8)) -> None:
        super().__init__()
        self.shape = shape

    def train_dataloader(self) -> Any:
        at = self.trainer
        assert at is not None
        return DataLoader(
            Stream(self, at.global_rank, at.world_size, at.global_step), batch_size=None
        )


def data_for(name: str) -> Data:
    return Data((1, 3, 8, 8)) if name == "mcm" else Data()


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:6] == "train/"}
        self.seen.append(logged)


def strategy(kind: str) -> Any:
    kinds = {
        "ddp": ReplicatedStrategy,
        "fsdp": ShardedStrategy,
        "hybrid": partial(ShardedStrategy, replicas=2),
    }
    return "auto" if kind == "single" else kinds[kind]()


def trainer_of(
    kind: str,
    world: int,
    updates: int,
    *callbacks: pl.Callback,
    folder: Path | None = None,
    precision: Any = "32-true",
) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy(kind),
        precision=precision,
        max_steps=updates,
        default_root_dir=folder,
        plugins=None if kind in ("fsdp", "hybrid") else [WholeCheckpointIO()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def states_of(trainer: pl.Trainer, module: FewStepModule) -> dict[str, Any]:
    """Every tensor and number that makes the run what it is, whole."""
    roles = [*module.trained_roles, "ema"]
    if isinstance(module, MotionConsistencyDistillation):
        roles.append("motion_average")
    found: dict[str, Any] = {
        name: whole(p) for role in roles for name, p in getattr(module, role).named_parameters(role)
    }
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                found[f"optimizer {number} {index} {key}"] = whole(value)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        found[f"rate {number}"] = torch.tensor(config.scheduler.get_last_lr()).double()
    return found


class KillAt(pl.Callback):
    """SIGKILL, as a scheduler or a full node would send it."""

    def __init__(self, update: int | None) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    kind: str,
    world: int,
    name: str,
    updates: int,
    kill_at: int | None = None,
    resume: Path | None = None,
    every: int = 5,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Trains, saving every so many updates; returns all state and the logged losses."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module, losses = method(name), Losses()
    callbacks = [losses, Checkpoints(every_n_updates=every), KillAt(kill_at)]
    trainer = trainer_of(kind, world, updates, *callbacks, folder=folder)
    trainer.fit(module, data_for(name), ckpt_path=resume, weights_only=True)
    return states_of(trainer, module), losses.seen


def train(
    kind: str, world: int, name: str, updates: int = 3, precision: Any = "32-true", **options: Any
) -> Run:
    """All trained weights, the logged losses, and whether anything was sharded."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module, losses = method(name, **options), Losses()
    trainer = trainer_of(kind, world, updates, losses, precision=precision)
    trainer.fit(module, data_for(name))
    roles = [*module.trained_roles, "ema"]
    weights = {n: p for role in roles for n, p in getattr(module, role).named_parameters(role)}
    sharded = any(isinstance(p, DTensor) for p in weights.values())
    return {n: whole(p) for n, p in weights.items()}, losses.seen, sharded


def trained(world: int, kind: str, name: str, **options: Any) -> list[Run]:
    """:func:`train` on so many ranks."""
    found: list[Any] = run_ranks(world, partial(train, **options), kind, world, name)
    return found


def assert_same_run(found: Run, expected: Run, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=rtol, atol=atol)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
