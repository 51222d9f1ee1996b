"""Runs that are asked to stop: when they do, what they leave behind, and how they go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor

from callbacks import Checkpoints, Evaluation, Preempted, Preemption
from callbacks.preemption import leave_if_requested, requested
from datamodules import RingData
from fewstep.errors import FewstepError
from fewstep.metrics import SlicedWasserstein
from lightning_modules import ConsistencyDistillation

from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

LAST = 8


class Ask(pl.Callback):
    """Asks the run to stop at the end of an update, as the batch script or SLURM would."""

    def __init__(self, update: int, how: str | signal.Signals = "file", rank: int = 0) -> None:
        self.update, self.how, self.rank = update, how, rank

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update and trainer.global_rank == self.rank:
            if isinstance(self.how, signal.Signals):
                os.kill(os.getpid(), self.how)
            else:
                Path(trainer.default_root_dir, "PREEMPT").touch()


def fit(
    folder: Path, callbacks: list[pl.Callback], resume: bool = False, **options: Any
) -> tuple[pl.Trainer, int | str | None]:
    """Trains on the ring; returns the trainer and the status it left with."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = quiet_trainer(folder, callbacks, LAST, **options)
    pl.seed_everything(0)
    module = ConsistencyDistillation(ring_teacher, 50)
    data = RingData(batch_size=32, reference_samples=64)
    last = str(folder / "checkpoints" / "last.ckpt") if resume else None
    try:
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
    except Preempted as stopped:
        return trainer, stopped.code
    return trainer, 0


def weights(trainer: pl.Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def saved_updates(folder: Path) -> list[int]:
    names = sorted(path.stem for path in (folder / "checkpoints").glob("update_*"))
    return [int(name.removeprefix("update_")) for name in names]


@pytest.mark.parametrize("how", ["file", signal.SIGUSR1, signal.SIGTERM])
def test_it_saves_and_stops_after_the_next_update(
    how: str | signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    evaluation = Evaluation([SlicedWasserstein()], num_steps=[1], num_samples=32)
    trainer, status = fit(
        tmp_path, [evaluation, Checkpoints(1000), Preemption(), Ask(update=3, how=how)]
    )
    assert (trainer.global_step, status) == (4, 75)
    assert saved_updates(tmp_path) == [4]
    assert not (tmp_path / "PREEMPT").exists()
    assert not (tmp_path / "results.json").exists(), "a preempted run took time to evaluate"
    assert "saved update 4" in capsys.readouterr().out
    assert not trainer.received_sigterm, "Lightning's own handler had a part in it"
    after = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    assert after == before


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", [Checkpoints(1000), Preemption()])
    fit(tmp_path / "cut", [Checkpoints(1000), Preemption(), Ask(update=2)])
    assert saved_updates(tmp_path / "cut") == [3]
    rest, status = fit(tmp_path / "cut", [Checkpoints(1000), Preemption()], resume=True)
    assert (rest.global_step, status) == (LAST, 0)
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)


def test_a_request_before_training_is_honoured_at_the_first_update(tmp_path: Path) -> None:
    (tmp_path / "PREEMPT").touch()
    trainer, status = fit(tmp_path, [Checkpoints(1000), Preemption()])
    assert (trainer.global_step, status) == (1, 75)


def test_a_run_that_is_done_with_the_last_update_is_not_stopped(tmp_path: Path) -> None:
    trainer, status = fit(tmp_path, [Checkpoints(1000), Preemption(), Ask(update=LAST - 1)])
    assert (trainer.global_step, status) == (LAST, 0)
    assert not (tmp_path / "PREEMPT").exists(), "the next start would be stopped"


def test_it_looks_only_every_so_many_updates(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, [Checkpoints(1000), Preemption(every_n_updates=3), Ask(update=3)])
    assert trainer.global_step == 6
    with pytest.raises(FewstepError, match="give 1 or more"):
        Preemption(every_n_updates=0)


class Long(pl.Callback):
    """Work after the last update, during which the run is asked to stop."""

    def __init__(self, how: str | signal.Signals, rank: int) -> None:
        self.how, self.rank, self.parts = how, rank, 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ask = Ask(trainer.global_step, self.how, self.rank)
        for part in range(4):
            leave_if_requested(trainer)
            self.parts += 1
            if part == 1:
                assert not requested(trainer)
                ask.on_train_batch_end(trainer)
                assert requested(trainer) == (trainer.global_rank == self.rank)


@pytest.mark.parametrize("how", ["file", signal.SIGTERM])
def test_work_after_the_last_update_is_left_at_its_next_safe_moment(
    how: str | signal.Signals, tmp_path: Path
) -> None:
    work, saving = Long(how, 0), Counting(1000)
    trainer, status = fit(tmp_path, [Preemption(), work, saving])
    assert (trainer.global_step, status, work.parts) == (LAST, 75, 2)
    assert saving.saves == 1, "the last update was saved twice"
    assert saved_updates(tmp_path) == [LAST]
    assert not (tmp_path / "PREEMPT").exists()


def test_two_ranks_leave_work_after_the_last_update_together(tmp_path: Path) -> None:
    callbacks = [Checkpoints(1000), Preemption(), Long(signal.SIGTERM, 1)]
    found = run_ranks(2, on_two_ranks, tmp_path, callbacks)
    assert [(step, status) for step, status, _ in found] == [(LAST, 75), (LAST, 0)]


class Asking(SlicedWasserstein):
    """A metric in whose time the run is asked to stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.cells = folder, 0

    def compute(self, *sets: Any) -> dict[str, float]:
        self.cells += 1
        if self.cells == 2:
            (self.folder / "PREEMPT").touch()
        return super().compute(*sets)


def test_a_final_evaluation_is_left_between_its_cells(tmp_path: Path) -> None:
    metric = Asking(tmp_path)
    evaluation = Evaluation([metric], num_steps=[1, 2, 4, 8], num_samples=32)
    trainer, status = fit(tmp_path, [evaluation, Checkpoints(1000), Preemption()])
    assert (trainer.global_step, status, metric.cells) == (LAST, 75, 2)
    assert saved_updates(tmp_path) == [LAST]
    assert not (tmp_path / "results.json").exists(), "half an evaluation counts as none"


class AskingWhileSampling(ConsistencyDistillation):
    """A method that is asked to stop while it makes an evaluation's samples."""

    batches = 0

    def sample(self, *args: Any, **options: Any) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            Path(self.trainer.default_root_dir, "PREEMPT").touch()
        return super().sample(*args, **options)


def left_while_sampling(folder: Path, devices: int) -> tuple[int | str | None, int]:
    """The status it was left with, and how many batches were made."""
    evaluation = Evaluation([SlicedWasserstein()], [1], 64, batch_size=4)
    callbacks = [evaluation, Checkpoints(1000), Preemption()]
    trainer = quiet_trainer(folder, callbacks, 2, devices=devices, strategy="ddp")
    module = AskingWhileSampling(ring_teacher, 50)
    with pytest.raises(Preempted) as stopped:
        trainer.fit(module, RingData(batch_size=32, reference_samples=64), weights_only=True)
    assert not (folder / "results.json").exists()
    return stopped.value.code, module.batches


def test_an_evaluation_is_left_between_two_batches_of_a_cell(tmp_path: Path) -> None:
    first, second = run_ranks(2, left_while_sampling, tmp_path, 2)
    assert first == (75, 3)
    assert second == (0, 3)


def test_nothing_is_asked_where_no_run_is_watched(tmp_path: Path) -> None:
    (tmp_path / "PREEMPT").touch()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[Preemption()]
    )
    assert not requested(trainer)
    leave_if_requested(trainer)


class Counting(Checkpoints):
    """Counts how often it saves."""

    saves = 0

    def save(self, trainer: pl.Trainer) -> None:
        self.saves += 1
        super().save(trainer)


@pytest.mark.parametrize("first", [True, False])
def test_an_update_is_saved_once_whichever_callback_comes_first(
    first: bool, tmp_path: Path
) -> None:
    saving = Counting(every_n_updates=4)
    order = [saving, Preemption()] if first else [Preemption(), saving]
    trainer, _ = fit(tmp_path, [*order, Ask(update=3)])
    assert trainer.global_step == 4
    assert saving.saves == 1
    assert saved_updates(tmp_path) == [4]


def test_without_a_checkpoint_callback_it_saves_all_the_same(tmp_path: Path) -> None:
    fit(tmp_path, [Preemption(), Ask(update=3)])
    assert saved_updates(tmp_path) == [4]


def test_of_several_the_first_does_the_work(tmp_path: Path) -> None:
    callbacks = [Checkpoints(1000), Preemption(every_n_updates=5), Preemption(), Ask(update=2)]
    trainer, status = fit(tmp_path, callbacks)
    assert (trainer.global_step, status) == (5, 75)


def test_requeueing_is_left_to_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    environment = SLURMEnvironment()

    class Strategy:
        cluster_environment = environment

    class Trainer:
        strategy = Strategy()
        callbacks = ()

    Preemption().setup(Trainer(), None, "fit")  # type: ignore[arg-type]
    assert not environment.auto_requeue


def on_two_ranks(folder: Path, callbacks: list[pl.Callback], resume: bool = False) -> Any:
    trainer, status = fit(folder, callbacks, resume, devices=2, strategy="ddp")
    return trainer.global_step, status, weights(trainer)


@pytest.mark.parametrize("how", ["file", signal.SIGTERM])
def test_two_ranks_stop_after_the_same_update_and_go_on_exactly(
    how: str | signal.Signals, tmp_path: Path
) -> None:
    watched: list[pl.Callback] = [Checkpoints(1000), Preemption()]
    asking = Ask(update=3, how=how, rank=0 if how == "file" else 1)
    whole = run_ranks(2, on_two_ranks, tmp_path / "whole", watched)
    first, second = run_ranks(2, on_two_ranks, tmp_path / "cut", [*watched, asking])
    assert first[:2] == (4, 75)
    assert second[:2] == (4, 0), "only the first rank may leave with a status"
    assert saved_updates(tmp_path / "cut") == [4]
    assert not (tmp_path / "cut" / "PREEMPT").exists()
    rest = run_ranks(2, on_two_ranks, tmp_path / "cut", watched, True)
    assert [r[:2] for r in rest] == [(LAST, 0)] * 2
    for undisturbed, resumed in zip(whole, rest, strict=True):
        torch.testing.assert_close(resumed[2], undisturbed[2], rtol=0, atol=0)
