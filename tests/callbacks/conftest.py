"""A small distillation run that callbacks take part in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from datamodules import RingData
from lightning_modules import ConsistencyDistillation

from rings import Run, quiet_trainer, ring_teacher


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def fit(callbacks: list[pl.Callback], updates: int = 4, **options: Any) -> pl.Trainer:
        made: pl.Trainer = quiet_trainer(
            tmp_path / "ring" / "version_0", callbacks, updates, **options
        )
        module = ConsistencyDistillation(ring_teacher, 50)
        made.fit(module, RingData(batch_size=64, reference_samples=512), weights_only=True)
        return made

    return fit
