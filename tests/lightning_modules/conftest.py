"""Small teachers, data and trainers for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from datamodules import Digits
from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks import DiT, RingMixture
from lightning_modules import FewStepModule

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=1e-3)


def tiny_dit() -> DiT:
    """A DiT small enough for a few milliseconds a step, with weights that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = DiT(8, 1, num_layers=2, num_heads=2, head_dim=8)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network


def digit_teacher() -> Denoiser:
    """A denoiser over digits."""
    return Denoiser(tiny_dit(), VPSchedule(), "v_prediction")


def ring_teacher(num_modes: int = 5, std: float = 0.1, **options: Any) -> Denoiser:
    """The exact denoiser of a ring."""
    schedule = VPSchedule()
    network = RingMixture(schedule, num_modes, std=std, **options)
    return Denoiser(network, schedule, "epsilon")


@pytest.fixture
def teacher() -> Callable[[], Denoiser]:
    return digit_teacher


@pytest.fixture
def exact_teacher() -> Callable[..., Denoiser]:
    return ring_teacher


@pytest.fixture
def backbone() -> Callable[[], DiT]:
    return tiny_dit


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    Digits(str(folder)).prepare_data()
    return folder


@pytest.fixture
def fit(digits_folder: Path, tmp_path: Path) -> Callable[..., pl.Trainer]:
    def run(
        module: FewStepModule,
        updates: int,
        ckpt_path: str | None = None,
        callbacks: list[pl.Callback] | None = None,
        batch_size: int = 16,
    ) -> pl.Trainer:
        trainer = pl.Trainer(
            max_steps=updates,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
            callbacks=callbacks,
        )
        data = Digits(str(digits_folder), batch_size=batch_size)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


@pytest.fixture
def digit_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.rand(12, 1, 8, 8, generator=generator) * 2 - 1,
        "cond": {"class_labels": torch.arange(12) % 10},
        "key": [str(i) for i in range(12)],
    }
