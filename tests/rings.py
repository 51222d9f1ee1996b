"""Small runs on the ring of Gaussians, whose exact teacher needs no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import RingMixture

Run = Callable[..., pl.Trainer]


def ring_teacher() -> Denoiser:
    """The exact denoiser of a ring of five."""
    schedule = VPSchedule()
    return Denoiser(RingMixture(schedule, 5), schedule, "epsilon")


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
