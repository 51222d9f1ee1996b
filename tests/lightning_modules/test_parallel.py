"""Replicated and sharded training against a single device on the same global batches."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from callbacks import Checkpoints
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.loading import load_denoiser, newest_checkpoint
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
)
from lightning_modules.parallel import ReplicatedStrategy, ShardedStrategy
from lightning_modules.whole import WholeCheckpointIO

from ranks import run_ranks

GLOBAL_BATCH = 8
# An eps that keeps AdamW from turning the rounding of tiny gradients into whole steps.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
OPTIONS: dict[str, Any] = {"optimizer": OPTIMIZER, "ema_decay": 0.9, "warmup_updates": 3}


def network() -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = DiT(8, 1, num_layers=2, num_heads=2, head_dim=8)
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return made


def teacher() -> Denoiser:
    return Denoiser(network(), VPSchedule(), "v_prediction")


class Phased(PhasedConsistencyDistillation):
    """With the same discriminator wherever it is built."""

    def build_roles(self) -> None:
        torch.manual_seed(3)
        super().build_roles()


def method(name: str, accumulate: int = 1) -> FewStepModule:
    options = {**OPTIONS, "accumulate": accumulate}
    if name == "teacher":
        return DiffusionTraining(network, VPSchedule(), "v_prediction", **options)
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

    def __iter__(self) -> Any:
        number = self.start
        while True:
            draws = torch.Generator().manual_seed(number)
            sample = torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=draws)
            labels = torch.randint(10, (GLOBAL_BATCH,), generator=draws)
            yield {
                "sample": sample[self.rows],
                "cond": {"class_labels": labels[self.rows]},
                "key": [str(number)] * len(labels[self.rows]),
            }
            number += 1


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        at = self.trainer
        assert at is not None
        return DataLoader(
            Stream(self, at.global_rank, at.world_size, at.global_step), batch_size=None
        )


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:6] == "train/"}
        self.seen.append(logged)


def strategy(kind: str) -> Any:
    return {"single": "auto", "ddp": ReplicatedStrategy, "fsdp": ShardedStrategy}[kind]


def trainer_of(
    kind: str, world: int, updates: int, *callbacks: pl.Callback, folder: Path | None = None
) -> pl.Trainer:
    made = strategy(kind)
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=made if isinstance(made, str) else made(),
        max_steps=updates,
        default_root_dir=folder,
        plugins=None if kind == "fsdp" else [WholeCheckpointIO()],
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
    trainer.fit(module, Data(), ckpt_path=resume, weights_only=True)
    return states_of(trainer, module), losses.seen


def train(
    kind: str, world: int, name: str, accumulate: int = 1, updates: int = 3
) -> tuple[dict[str, Tensor], list[dict[str, float]], bool]:
    """All trained weights, the logged losses, and whether anything was sharded."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module, losses = method(name, accumulate), Losses()
    trainer = trainer_of(kind, world, updates, losses)
    trainer.fit(module, Data())
    roles = [*module.trained_roles, "ema"]
    weights = {n: p for role in roles for n, p in getattr(module, role).named_parameters(role)}
    sharded = any(isinstance(p, DTensor) for p in weights.values())
    return {n: whole(p) for n, p in weights.items()}, losses.seen, sharded


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["teacher", "lcm", "pcm", "adversarial"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_device_does(kind: str, name: str, accumulate: int) -> None:
    ((alone, losses, _),) = run_ranks(1, train, "single", 1, name, accumulate)
    first, second = run_ranks(2, train, kind, 2, name, accumulate)
    assert first[2] == (kind == "fsdp")
    assert alone.keys() == first[0].keys()
    for parameter, expected in alone.items():
        torch.testing.assert_close(first[0][parameter], expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(first[0][parameter], second[0][parameter]), parameter
    for mine, expected_losses in zip(first[1], losses, strict=True):
        assert mine == pytest.approx(expected_losses, rel=1e-3, abs=1e-5)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


WORLD = {"single": 1, "ddp": 2, "fsdp": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "lcm", "pcm", "adversarial"])
@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp"])
def test_a_killed_run_is_bit_equal_to_the_undisturbed_one(
    tmp_path: Path, kind: str, name: str
) -> None:
    world = WORLD[kind]
    undisturbed = run_ranks(world, run, tmp_path / "whole", kind, world, name, 12)
    killed = tmp_path / "killed"
    run_ranks(world, run, killed, kind, world, name, 12, 7, dies=True)
    last = newest_checkpoint(killed)
    assert last is not None
    assert last.resolve().name == "update_00000005.ckpt"
    assert last.is_dir() == (kind == "fsdp")
    resumed = run_ranks(world, run, killed, kind, world, name, 12, None, last)
    for (states, losses), (expected, all_losses) in zip(resumed, undisturbed, strict=True):
        assert_equal(states, expected)
        assert losses == all_losses[5:]
        assert any("exp_avg_sq" in key for key in states)


class Moment:
    """True from some time after a life's first checkpoint on."""

    def __init__(self, folder: Path, resume: Path | None, lifetime: float) -> None:
        self.folder, self.lifetime = folder, lifetime
        self.resumed = None if resume is None else resume.resolve()
        self.begun: float | None = None

    def __call__(self) -> bool:
        newest = max(self.folder.glob("update_*.ckpt"), default=None)
        if self.begun is None and newest not in (None, self.resumed):
            self.begun = time.monotonic()
        return self.begun is not None and time.monotonic() - self.begun > self.lifetime


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("single", 14), ("fsdp", 6)])
def test_a_run_killed_at_any_moment_of_saving_is_resumable(
    tmp_path: Path, kind: str, times: int
) -> None:
    """Every update is saved, so nearly every moment is one of saving."""
    moments = random.Random(0)
    world, folder = WORLD[kind], tmp_path / "checkpoints"
    before = 0
    for _ in range(times):
        resume = newest_checkpoint(tmp_path)
        moment = Moment(folder, resume, moments.uniform(0, 0.4))
        given = (tmp_path, kind, world, "lcm", 10**6, None, resume, 1)
        run_ranks(world, run, *given, dies=True, kill_when=moment)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        update = int(newest.resolve().stem.removeprefix("update_"))
        assert update > before
        before = update
    saved = load_denoiser(tmp_path)
    assert all(p.isfinite().all() for p in saved.denoiser.parameters())


@pytest.mark.parametrize("there", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize(("kind", "world"), [("single", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 4)])
def test_a_checkpoint_is_loaded_into_any_number_of_ranks(
    tmp_path: Path, there: str, kind: str, world: int
) -> None:
    """Five updates and no more: what is loaded must be what was saved."""
    saved, *_ = run_ranks(WORLD[there], run, tmp_path, there, WORLD[there], "adversarial", 5)
    last = newest_checkpoint(tmp_path)
    loaded = run_ranks(world, run, tmp_path / "other", kind, world, "adversarial", 5, None, last)
    for states, _ in loaded:
        assert_equal(states, saved[0])


def test_a_sharded_checkpoint_serves_as_a_teacher(tmp_path: Path) -> None:
    (states, _), _ = run_ranks(2, run, tmp_path, "fsdp", 2, "teacher", 5)
    loaded = load_denoiser(tmp_path)
    assert loaded.role == "ema"
    for name, value in loaded.denoiser.named_parameters("ema"):
        assert torch.equal(value, states[name])


def test_a_sharded_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run_ranks(2, run, tmp_path, "fsdp", 2, "lcm", 5)

    def other() -> str:
        with pytest.raises(FewstepError) as caught:
            run(tmp_path / "other", "fsdp", 2, "pcm", 6, None, newest_checkpoint(tmp_path))
        return str(caught.value)

    for message in run_ranks(2, other):
        assert "of another experiment" in message
        assert "method: 'ConsistencyDistillation' in the checkpoint" in message
