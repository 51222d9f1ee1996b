"""Small runs on the ring of Gaussians, whose exact teacher needs no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, GaussianMixture, VPSchedule
from fewstep.networks import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import FewStepModule

Run = Callable[..., pl.Trainer]


def ring_teacher() -> Denoiser:
    """The exact denoiser of a ring of five."""
    schedule = VPSchedule()
    return Denoiser(RingMixture(schedule, 5), schedule, "epsilon")


def distil(
    module: FewStepModule, mixture: GaussianMixture, updates: int, size: int, rate: float
) -> None:
    """Trains a built student of a mixture on batches of its samples, by Adam, without a trainer."""
    optimizer = torch.optim.Adam(module.student.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(updates):
        generator = torch_generator(0, "train", update)
        samples, _ = mixture.sample(size, generator)
        batch: Batch = {"sample": samples.float(), "cond": {}, "key": []}
        (step,) = list(module.updates(batch, module.draw(batch, generator)))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        decay.step()


def quiet_trainer(
    folder: Path,
    callbacks: list[Any],
    updates: int,
    kind: type[pl.Trainer] = pl.Trainer,
    **options: Any,
) -> Any:
    """A trainer that prints, logs and saves nothing of its own accord."""
    return kind(
        max_steps=updates,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=callbacks,
        **{"logger": False, **options},
    )
