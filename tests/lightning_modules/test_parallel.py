"""Replicated and sharded training against a single device on the same global batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import DiT
from lightning_modules import (
    ConsistencyDistillation,
    DiffusionTraining,
    FewStepModule,
    PhasedConsistencyDistillation,
)
from lightning_modules.parallel import ReplicatedStrategy, ShardedStrategy

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


def trainer_of(kind: str, world: int, updates: int, *callbacks: pl.Callback) -> pl.Trainer:
    made = strategy(kind)
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=made if isinstance(made, str) else made(),
        max_steps=updates,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


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
