"""Runs whose losses stop being numbers: what stays finite, what stops, and what a user reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks import Checkpoints, FiniteLosses
from callbacks.finite import EXIT_STATUS
from datamodules import RingData
from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from lightning_modules import ConsistencyDistillation
from lightning_modules.consistency_distillation import ConsistencyDraws
from lightning_modules.finite import neutralise
from lightning_modules.roles import Update

from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

Run = Callable[..., "Spoilt"]


class Spoilt(ConsistencyDistillation):
    """Its loss is NaN at the given updates, counted from 1."""

    def __init__(self, spoilt: set[int], **options: Any) -> None:
        super().__init__(ring_teacher, 50, **options)
        self.spoilt = spoilt

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        factor = float("nan") if self.student_updates + 1 in self.spoilt else 1.0
        for update in super().updates(batch, draws):
            yield Update(update.role, update.loss * factor, {"loss": update.loss * factor})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def fit(
        spoilt: set[int],
        callbacks: list[pl.Callback],
        updates: int = 12,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> Spoilt:
        torch.manual_seed(0)
        module = Spoilt(spoilt, **options)
        trainer = quiet_trainer(tmp_path, callbacks, updates)
        data = RingData(batch_size=32, reference_samples=64)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module

    return fit


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("update_*"))


def test_a_run_stops_with_the_last_good_checkpoint_and_says_so(run: Run, tmp_path: Path) -> None:
    callbacks = [FiniteLosses(every_n_updates=100), Checkpoints(every_n_updates=4, keep=None)]
    with pytest.raises(FewstepError) as stopped:
        run({6}, callbacks)
    message = str(stopped.value)
    assert "loss and student_grad_norm were not finite at update 6." in message
    assert "update_00000004.ckpt, is from before it and usable" in message
    assert "--ckpt_path last" in message
    assert "learning rate" in message
    assert "bf16" not in message, "the run was not in fp16"
    assert len(message.split("\n")) <= 3
    assert getattr(stopped.value, "status", None) == EXIT_STATUS
    assert saved(tmp_path) == ["update_00000004.ckpt"], "a spoilt state was saved"
    run(set(), [Checkpoints(4)], ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))


def test_it_looks_at_the_stated_updates_and_at_the_end(run: Run) -> None:
    with pytest.raises(FewstepError, match="at update 3") as stopped:
        run({3}, [FiniteLosses(every_n_updates=5)])
    assert stopped.value.__cause__ is None
    seen: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(trainer.global_step)

    with pytest.raises(FewstepError, match="begin anew"):
        run({3}, [Count(), FiniteLosses(every_n_updates=5)])
    assert seen[-1] == 5
    with pytest.raises(FewstepError, match="at update 12"):
        run({12}, [FiniteLosses(every_n_updates=100)])


def test_updates_are_skipped_up_to_the_stated_number(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finite = FiniteLosses(max_skipped=2, every_n_updates=4)
    module = run({2, 7}, [finite, Checkpoints(4)])
    assert finite.skipped == 2
    assert module.student_updates == 12
    assert "not finite at update 2; the update was skipped (1 of at most 2" in (
        capsys.readouterr().out
    )
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
    for state in module.trainer.optimizers[0].state.values():
        assert all(value.isfinite().all() for value in state.values())
    with pytest.raises(FewstepError, match="3 such updates, of at most 2"):
        run({2, 7, 9}, [FiniteLosses(max_skipped=2, every_n_updates=4)])


def test_the_count_goes_on_over_a_resumption(run: Run, tmp_path: Path) -> None:
    run({2}, [FiniteLosses(max_skipped=1), Checkpoints(4)], updates=4)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(FewstepError, match="2 such updates, of at most 1"):
        run({6}, [FiniteLosses(max_skipped=1), Checkpoints(4)], updates=8, ckpt_path=last)


def test_a_skipped_update_of_a_fused_optimiser_changes_nothing(run: Run) -> None:
    fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    watch = Watch()
    run({3}, [watch, FiniteLosses(max_skipped=1)], updates=4, optimizer=fused)
    before, skipped, after = watch.weights[1:4]
    assert all(map(torch.equal, before, skipped))
    assert not all(map(torch.equal, skipped, after))


class Watch(pl.Callback):
    """Keeps the student's weights after each update."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.weights.append([p.detach().clone() for p in module.student.parameters()])


def test_watching_changes_no_weight(run: Run) -> None:
    alone, watched = run(set(), []), run(set(), [FiniteLosses(every_n_updates=1)])
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_noting_an_update_does_not_wait_for_the_device(run: Run) -> None:
    class Reading(FiniteLosses):
        looks = 0

        def _look(self, *args: Any) -> None:
            type(self).looks += self._flags is not None
            super()._look(*args)

    run(set(), [Reading(every_n_updates=6)])
    assert Reading.looks == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_stay_to_the_bit_or_become_zero(dtype: torch.dtype) -> None:
    gradients = [torch.randn(3, 4, dtype=dtype).t(), torch.randn((), dtype=dtype)]
    before = [g.clone() for g in gradients]
    assert neutralise(gradients, torch.tensor(2.5)).item() is True
    assert all(map(torch.equal, before, gradients))
    gradients[0][1, 2] = float("nan")
    gradients[1].fill_(float("-inf"))
    assert neutralise(gradients, torch.tensor(float("inf"))).item() is False
    assert not any(g.any() for g in gradients)


def test_gradients_of_several_dtypes_are_neutralised_together() -> None:
    gradients = [torch.full((2,), float("nan"), dtype=d) for d in (torch.float32, torch.bfloat16)]
    neutralise(gradients, torch.tensor(float("nan")))
    assert not any(g.any() for g in gradients)


class SpoiltOnOne(ConsistencyDistillation):
    """Logs a value that is NaN at stated (update, rank) pairs; its losses are averaged as ever."""

    def __init__(self, spoilt: set[tuple[int, int]], in_loss: bool) -> None:
        super().__init__(ring_teacher, 50)
        self.spoilt, self.in_loss = spoilt, in_loss

    def updates(self, batch: Batch, draws: ConsistencyDraws) -> Iterator[Update]:
        here = (self.student_updates + 1, self.global_rank) in self.spoilt
        factor = float("nan") if here and self.in_loss else 1.0
        for update in super().updates(batch, draws):
            yield Update(update.role, update.loss * factor, update.logs)
        value = float("nan") if here and not self.in_loss else 1.0
        self.log("train/own", torch.tensor(value))


def fit_on_two(
    folder: Path, spoilt: set[tuple[int, int]], in_loss: bool, max_skipped: int
) -> tuple[str | None, int, int, list[str]]:
    """The error, the updates, those skipped, and what was saved: what this rank knows of them."""
    finite = FiniteLosses(max_skipped=max_skipped, every_n_updates=5)
    callbacks = [finite, Checkpoints(every_n_updates=3, keep=None)]
    trainer = quiet_trainer(folder, callbacks, 12, devices=2, strategy="ddp")
    message = None
    torch.manual_seed(0)
    try:
        trainer.fit(SpoiltOnOne(spoilt, in_loss), RingData(batch_size=32, reference_samples=64))
    except FewstepError as error:
        message = str(error)
    return message, trainer.global_step, finite.skipped, saved(folder)


@pytest.mark.parametrize("in_loss", [True, False])
def test_all_ranks_stop_alike_when_one_alone_sees_a_nan(in_loss: bool, tmp_path: Path) -> None:
    # The second rank's comes first; the first rank's alone must not be what is told.
    spoilt = {(4, 1), (5, 0)}
    first, second = run_ranks(2, fit_on_two, tmp_path, spoilt, in_loss, 0)
    assert first == second
    message, updates, _, checkpoints = first
    assert "not finite at update 4" in message
    assert updates == 5
    assert checkpoints == ["update_00000003.ckpt"]


def test_all_ranks_skip_alike_when_one_alone_sees_a_nan(tmp_path: Path) -> None:
    found = run_ranks(2, fit_on_two, tmp_path, {(4, 1)}, True, 1)
    everything = [f"update_{update:08d}.ckpt" for update in (3, 6, 9, 12)]
    assert found == [(None, 12, 1, everything)] * 2


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(FewstepError, match="max_skipped of at least 0"):
        FiniteLosses(max_skipped=-1)
