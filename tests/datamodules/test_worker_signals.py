"""Loading processes and signals: which end them, and which are not theirs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from datamodules.streaming import Loader
from datamodules.worker_signals import JOB_SIGNALS, leave_signals_to_training
from datamodules.workers import prepare_worker


class Slow(Dataset[int]):
    """Numbers; from a given one on each takes so long that nobody waits for it."""

    def __init__(self, quick: int) -> None:
        self.quick = quick

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, number: int) -> int:
        if number >= self.quick:
            time.sleep(100)
        return number


def loader(quick: int) -> Loader:
    return Loader(Slow(quick), batch_size=None, num_workers=2, worker_init_fn=prepare_worker)


def workers_of(batches: Iterator[Any]) -> list[Any]:
    return list(batches.batches._workers)  # type: ignore[attr-defined]


def signal_from_elsewhere(number: signal.Signals, workers: list[Any]) -> None:
    """Sends it as a launcher would, which is not the parent."""
    ids = [str(worker.pid) for worker in workers]
    subprocess.run(["kill", f"-{number.value}", *ids], check=True)


def wait_until_taken(number: signal.Signals, process: int) -> None:
    """A second signal of the same kind would be lost before."""
    bit = 1 << (number - 1)
    while True:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        if not bit & int(next(x for x in lines if x.startswith("ShdPnd")).split()[1], 16):
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", sorted(JOB_SIGNALS))
def test_a_signal_to_the_whole_job_does_not_end_them(number: signal.Signals) -> None:
    batches = iter(loader(1000))
    # The first while they may not have begun yet.
    for place in range(40):
        if place % 10 == 0:
            signal_from_elsewhere(number, workers_of(batches))
        assert next(batches) == place
    time.sleep(0.2)
    assert [worker.exitcode for worker in workers_of(batches)] == [None, None]


def test_the_training_process_gets_its_own_signals() -> None:
    batches = iter(loader(1000))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & JOB_SIGNALS
    assert next(batches) == 0
    leave_signals_to_training()  # of no effect where there is no training process above
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & JOB_SIGNALS


def test_the_training_process_ends_them_amid_a_read() -> None:
    batches = iter(loader(2))
    assert [next(batches), next(batches)] == [0, 1]
    workers = workers_of(batches)
    signal_from_elsewhere(signal.SIGTERM, workers)
    for worker in workers:
        wait_until_taken(signal.SIGTERM, worker.pid)
        worker.terminate()
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]


def begin_and_stay(sender: Any) -> None:
    batches = iter(loader(2))
    next(batches)
    sender.send([worker.pid for worker in workers_of(batches)])
    time.sleep(100)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_they_end_with_the_training_process_even_amid_a_read() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    training = context.Process(target=begin_and_stay, args=(sender,))
    training.start()
    workers = receiver.recv()
    assert training.pid is not None
    os.kill(training.pid, signal.SIGKILL)
    training.join()
    until = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
