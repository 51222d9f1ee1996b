"""Runs that are resumed when no update is left: evaluated if they were not, else left alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks import Checkpoints, Evaluation, Preempted, Preemption
from callbacks.preemption import leave_if_requested
from datamodules import RingData
from fewstep.metrics import SlicedWasserstein
from lightning_modules import ConsistencyDistillation
from lightning_modules.parallel import ShardedStrategy
from scripts.trainer import FewstepTrainer

from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

LAST = 3


class Interrupt(pl.Callback):
    """Has the last rank asked to stop after the last update, before anything is measured."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        leave_if_requested(trainer)


def fit(
    folder: Path, interrupted: bool, resume: bool, strategy: str | None = None
) -> tuple[int | str | None, str]:
    """Trains, or goes on; returns the status it left with and what it printed."""
    where: dict[str, Any] = {"devices": 1}
    if strategy is not None:
        where = {"devices": 2, "strategy": ShardedStrategy() if strategy == "fsdp2" else strategy}
    evaluation = Evaluation([SlicedWasserstein()], num_steps=[1], num_samples=64, batch_size=32)
    callbacks = [Preemption(), *[Interrupt()] * interrupted, evaluation, Checkpoints()]
    trainer = quiet_trainer(folder, callbacks, LAST, FewstepTrainer, **where)
    torch.manual_seed(0)
    data = RingData(batch_size=32, reference_samples=64)
    last = str(folder / "checkpoints" / "last.ckpt") if resume else None
    printed = io.StringIO()
    status: int | str | None = 0
    with contextlib.redirect_stdout(printed):
        try:
            module = ConsistencyDistillation(ring_teacher, 50)
            trainer.fit(module, data, ckpt_path=last, weights_only=True)
        except Preempted as stopped:
            status = stopped.code
    return status, printed.getvalue()


@pytest.mark.parametrize("strategy", [None, pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_a_run_preempted_before_it_was_measured_is_measured_when_it_is_resumed(
    strategy: str | None, tmp_path: Path
) -> None:
    def go(interrupted: bool, resume: bool) -> tuple[int | str | None, str]:
        if strategy is None:
            return fit(tmp_path, interrupted, resume)
        first, second = run_ranks(2, fit, tmp_path, interrupted, resume, strategy)
        assert second == (0, ""), "only the first rank speaks, and leaves with a status"
        return first

    results = tmp_path / "results.json"
    assert go(interrupted=True, resume=False)[0] == 75
    assert not results.exists()
    status, printed = go(interrupted=False, resume=True)
    assert status == 0
    assert "is of update 3. What is left is its evaluation." in printed
    assert "sliced" in printed.lower()
    written = results.read_text()
    assert json.loads(written)["student_updates"] == LAST
    status, printed = go(interrupted=False, resume=True)
    assert status == 0
    assert "nothing left to do" in printed
    assert results.read_text() == written


def test_results_of_another_number_of_updates_do_not_count(tmp_path: Path) -> None:
    fit(tmp_path, interrupted=True, resume=False)
    old = {"student_updates": LAST - 1, "measurements": [{"metric": "of earlier weights"}]}
    (tmp_path / "results.json").write_text(json.dumps(old))
    fit(tmp_path, interrupted=False, resume=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["student_updates"] == LAST
    assert len(found["measurements"]) == 1
    assert found["measurements"][0]["num_steps"] == 1
