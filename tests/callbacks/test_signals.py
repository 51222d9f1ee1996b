"""Signals before, during and without training: Lightning's own answers to them never come."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import Checkpoints, Preempted, Preemption
from callbacks.signals import SIGNALS, Signals
from datamodules import RingData
from lightning_modules import ConsistencyDistillation

from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

UPDATES = 4


class Asking(RingData):
    """Data that are asked for after Lightning has registered its handlers, before any training."""

    number: signal.Signals | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        if self.number is not None and self.trainer.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), self.number)
        return super().train_dataloader()


def fit(
    folder: Path, callbacks: list[pl.Callback], number: signal.Signals | None = None, **options: Any
) -> tuple[Any, int | str | None]:
    trainer = quiet_trainer(folder, callbacks, UPDATES, **options)
    data = Asking(batch_size=32, reference_samples=64)
    data.number = number
    try:
        trainer.fit(ConsistencyDistillation(ring_teacher, 50), data)
    except Preempted as stopped:
        return trainer, stopped.code
    return trainer, 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_counts_at_the_first_update(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    trainer, status = fit(tmp_path, [Checkpoints(1000), Preemption()], number)
    assert (trainer.global_step, status) == (1, 75)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert not trainer.received_sigterm, "Lightning's own handler had a part in it"
    assert [signal.getsignal(one) for one in SIGNALS] == before


def on_two_ranks(folder: Path, callbacks: list[pl.Callback], number: Any) -> Any:
    trainer, status = fit(folder, callbacks, number, devices=2, strategy="ddp")
    return trainer.global_step, status


def test_a_signal_to_one_of_two_ranks_before_training_stops_both(tmp_path: Path) -> None:
    callbacks = [Checkpoints(1000), Preemption()]
    found = run_ranks(2, on_two_ranks, tmp_path, callbacks, signal.SIGTERM)
    assert found == [(1, 75), (1, 0)]


def test_a_signal_of_an_earlier_run_does_not_count_in_the_next(tmp_path: Path) -> None:
    watcher = Preemption()
    assert fit(tmp_path, [watcher, Checkpoints(1000)], signal.SIGTERM)[1] == 75
    assert fit(tmp_path, [watcher, Checkpoints(1000)])[1] == 0


# ---------------------------------------------------------------------- Lightning's own question


class Broadcasts(pl.Callback):
    """Counts the tensors that are broadcast while batches are trained on."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_start(self, *args: Any) -> None:
        self.original = torch.distributed.broadcast

        def counting(*args: Any, **options: Any) -> Any:
            self.count += 1
            return self.original(*args, **options)

        torch.distributed.broadcast = counting

    def on_train_end(self, *args: Any) -> None:
        torch.distributed.broadcast = self.original


def broadcasts(folder: Path, callbacks: list[pl.Callback]) -> tuple[int, bool]:
    """How many there are, and whether Lightning's question is still replaced afterwards."""
    counting = Broadcasts()
    trainer, status = fit(folder, [*callbacks, counting], devices=2, strategy="ddp")
    assert (trainer.global_step, status) == (UPDATES, 0)
    return counting.count, "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)


def test_no_rank_waits_for_its_device_at_the_start_of_a_batch(tmp_path: Path) -> None:
    asked = run_ranks(2, broadcasts, tmp_path, [])
    assert asked == [(UPDATES, False)] * 2, "what this test counts is no longer there"
    assert run_ranks(2, broadcasts, tmp_path, [Preemption()]) == [(0, False)] * 2


def test_other_versions_of_lightning_may_lack_what_is_replaced() -> None:
    class Loop:
        epoch_loop = object()

    class Bare:
        fit_loop = Loop()

    before, signals = signal.getsignal(signal.SIGTERM), Signals()
    signals.answer(Bare(), lambda number, frame: None)  # type: ignore[arg-type]
    signals.stop_asking_each_batch(Bare())  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) is not before
    signals.hand_back()
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------- commands that only measure


class Ask(pl.Callback):
    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_validation_batch_start(self, *args: Any) -> None:
        os.kill(os.getpid(), self.number)


def validate(folder: Path, number: signal.Signals) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[Preemption(), Ask(number)],
    )
    data = RingData(batch_size=32, reference_samples=64)
    trainer.validate(ConsistencyDistillation(ring_teacher, 50), data, verbose=False)
    os._exit(7)  # it went on


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_that_only_measures_at_once(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=validate, args=(tmp_path, number))
    process.start()
    process.join(60)
    assert process.exitcode == -number


def test_the_ranks_it_has_started_end_with_it() -> None:
    told: list[int] = []

    class Launcher:
        def kill(self, number: int) -> None:
            told.append(number)

    class Strategy:
        launcher = Launcher()

    class Trainer:
        strategy = Strategy()

    acted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: acted.append(number))
    try:
        Signals().end_at_once(Trainer())  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == acted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
