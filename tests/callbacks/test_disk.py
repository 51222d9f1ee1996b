"""Disks that fill up while a run writes: what stays, what ranks agree on, and what a user reads."""

from __future__ import annotations

import contextlib
import errno
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from callbacks import Checkpoints
from callbacks.disk import explained_when_full, full_reason
from datamodules import RingData
from fewstep.errors import FewstepError
from lightning_modules import ConsistencyDistillation
from lightning_modules.parallel import ShardedStrategy
from lightning_modules.whole import WholeCheckpointIO

from ranks import run_ranks
from rings import quiet_trainer, ring_teacher

SMALL = 4096  # bytes a file may have, where a test plays a full disk


@contextlib.contextmanager
def small_files(size: int = SMALL) -> Iterator[None]:
    """No file may grow beyond ``size``: what works without any privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def module() -> ConsistencyDistillation:
    return ConsistencyDistillation(ring_teacher, 50)


class FullAt(Checkpoints):
    """Finds the disk full at one update, on some ranks."""

    def __init__(self, update: int, ranks: tuple[int, ...] = (0, 1), size: int = SMALL) -> None:
        super().__init__(every_n_updates=2, keep=None)
        self.update, self.ranks, self.size = update, ranks, size

    def save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self.update and trainer.global_rank in self.ranks:
            with small_files(self.size):
                super().save(trainer)
        else:
            super().save(trainer)


def fit(folder: Path, callback: pl.Callback, resume: bool = False, **options: Any) -> str | int:
    """Trains for six updates; returns the error's message, or how many updates there were."""
    if options.get("strategy") == "fsdp2":
        options["strategy"] = ShardedStrategy()
    trainer = quiet_trainer(folder, [callback], 6, **options)
    if not isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    last = str(folder / "checkpoints" / "last.ckpt") if resume else None
    torch.manual_seed(0)
    data = RingData(batch_size=32, reference_samples=64)
    try:
        trainer.fit(module(), data, ckpt_path=last, weights_only=True)
    except FewstepError as error:
        return str(error)
    return trainer.global_step


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


EARLIER = ["last.ckpt", "update_00000002.ckpt"]


def check(message: str | int, folder: Path) -> None:
    assert isinstance(message, str)
    assert "update_00000004.ckpt" in message
    for words in ("GiB are free", "GiB are needed", "Make room", "--ckpt_path last"):
        assert words in message
    assert len(message.splitlines()) == 3
    assert saved(folder) == EARLIER, "the partial file stayed, or an earlier one went"


@pytest.mark.parametrize("size", [SMALL, 0])
def test_a_full_disk_keeps_the_earlier_checkpoints_and_says_how_to_go_on(
    size: int, tmp_path: Path
) -> None:
    message = fit(tmp_path, FullAt(4, size=size))
    check(message, tmp_path)
    assert "File too large" in str(message)
    assert fit(tmp_path, Checkpoints(2), resume=True) == 6


def test_two_ranks_end_alike_where_only_the_first_writes(tmp_path: Path) -> None:
    options = {"devices": 2, "strategy": "ddp"}
    started = time.monotonic()
    for message in run_ranks(2, fit_with, tmp_path, (4, (0,)), options):
        check(message, tmp_path)
    assert time.monotonic() - started < 60
    assert run_ranks(2, fit_with, tmp_path, None, options) == [6, 6]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param((0,), marks=pytest.mark.slow),
        (1,),
        pytest.param((0, 1), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_end_alike_whichever_shard_did_not_fit(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    options = {"devices": 2, "strategy": "fsdp2"}
    for message in run_ranks(2, fit_with, tmp_path, (4, ranks), options):
        check(message, tmp_path)
    assert run_ranks(2, fit_with, tmp_path, None, options) == [6, 6]


def fit_with(
    folder: Path, full: tuple[int, tuple[int, ...]] | None, options: dict[str, Any]
) -> str | int:
    callback = FullAt(*full) if full else Checkpoints(2, keep=None)
    return fit(folder, callback, resume=full is None, **options)


# ---------------------------------------------------------------------- what means a full disk


def failing(work: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as met:  # noqa: PT011 - any error will do
        work()
    return met.value


def test_the_writers_of_torch_are_understood_with_and_without_their_cause(tmp_path: Path) -> None:
    content = {"a": torch.ones(100_000)}
    with small_files():
        to_path = failing(lambda: torch.save(content, tmp_path / "x"))
        to_file = failing(lambda: WholeCheckpointIO().save_checkpoint(content, tmp_path / "y"))
    assert full_reason(to_path) == "it could not be written whole"
    assert full_reason(to_file) == "File too large"
    assert full_reason(CheckpointException("write", {1: (to_file, None)})) == "File too large"  # type: ignore[dict-item]


def test_a_device_without_space_is_understood() -> None:
    with (
        pytest.raises(FewstepError, match="'runs/x' could not be written: No space left on device"),
        explained_when_full(Path("runs/x")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"1")


def test_other_errors_pass_as_they_are() -> None:
    broken = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"), explained_when_full(Path("x")):
        raise broken
    cut_short = RuntimeError("unexpected pos 1 vs 2")
    cut_short.__context__ = broken
    assert full_reason(cut_short) is None
    assert full_reason(RuntimeError("shared memory(shm): No space left on device (28)")) is None
    assert full_reason(CheckpointException("read", {0: (KeyError("a"), None)})) is None  # type: ignore[dict-item]
