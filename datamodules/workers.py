"""A data-loading process that dies ends the run with the reason and the remedy."""

from __future__ import annotations

import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from datamodules.worker_signals import leave_signals_to_training
from fewstep.errors import FewstepError

# The exit status of a loading process that could not hand a batch over for want of shared memory.
UNSENT = 74
NO_ROOM = ("shared memory", "</torch_")  # in torch's words
# How torch tells of a dead loading process: while it waits for a batch, or whenever the system
# tells of the death, which can be at any line of the training process.
DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)|Pin memory thread exited")
KILLED_BY = re.compile(r"killed by signal: ([^.]+)")
EXIT_CODE = re.compile(r"exit code (\d+)")
# What breaks in the training process when the other end of a pipe or socket is gone.
BROKEN = (ConnectionResetError, BrokenPipeError, EOFError)
# torch's handler adds this to what a loading process itself raised: an error of the data.
RAISED_THERE = "Caught "
SHARED_MEMORY = "/dev/shm"
GIB = 2**30


def prepare_worker(number: int) -> None:
    """What a loading process does first; for DataLoader's ``worker_init_fn``.

    Args:
        number: of the loading process.
    """
    leave_signals_to_training()
    _end_when_unsent()


def _end_when_unsent() -> None:
    """Makes a loading process end when a batch cannot be sent, as where /dev/shm is full.

    Python's own queue prints the error and drops the batch; the training process would wait for it
    for ever.
    """

    def end(error: Exception, batch: Any) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(UNSENT if any(words in str(error) for words in NO_ROOM) else 1)

    # A hook for subclasses; this process is the loader's alone.
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(end))  # noqa: B010


def explained(error: BaseException, workers: Sequence[Any] | None = None) -> FewstepError | None:
    """What to tell the user, if the error means that a loading process died.

    Args:
        error: what the training process met.
        workers: the loading processes, if the error was met while it waited for a batch.
    """
    message = str(error)
    if message.startswith(RAISED_THERE):
        return None
    if isinstance(error, BROKEN):
        return None if workers is None else _dead(_status_of_first(workers))
    if not (isinstance(error, RuntimeError) and DEATH.search(message)):
        return None
    if named := KILLED_BY.search(message):
        return _dead(f"killed by {_signal_of(named[1].strip())}")
    if code := EXIT_CODE.search(message):
        return _dead(_described(int(code[1])))
    return _dead(_status_of_first(workers or []))


def _status_of_first(workers: Sequence[Any]) -> str:
    """What became of the first loading process that has ended."""
    ended = wait([worker.sentinel for worker in workers], timeout=2)
    for worker in workers:
        if worker.sentinel in ended:  # its files are closed a moment before its status is known
            worker.join(timeout=2)
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    return _described(codes[0]) if codes else "gone, for an unknown reason"


def _signal_of(words: str) -> str:
    """SIGKILL of "Killed", and so on."""
    return next((s.name for s in signal.Signals if signal.strsignal(s) == words), words)


def _described(code: int) -> str:
    if code == UNSENT:
        return f"unable to hand a batch over, since {SHARED_MEMORY} is full"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"gone with exit status {code}"


def _dead(how: str) -> FewstepError:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
        room = f" ({usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free now)"
    except OSError:
        room = ""
    return FewstepError(
        f"A data-loading process is {how}. Most often the machine or the job ran out of memory "
        f"(`dmesg` or the job's log tells), or {SHARED_MEMORY}, through which batches travel, is "
        f"full{room}.\nLower data.init_args.num_workers or data.init_args.prefetch_batches, ask "
        f"for more memory, or enlarge {SHARED_MEMORY} (containers: --shm-size).\n"
        "Then the same command with --ckpt_path last goes on; the order of the samples stays."
    )


class Explained(Iterator[Any]):
    """Batches of a loader's iterator; the death of a loading process is explained.

    Args:
        batches: what DataLoader's ``iter`` gives.

    Raises:
        FewstepError: while a batch is waited for, if a loading process died.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except (RuntimeError, *BROKEN) as error:
            workers = getattr(self.batches, "_workers", None)
            try:
                clear = explained(error, workers)
            except RuntimeError as told:  # by the system, meanwhile
                clear = explained(told, workers)
            if clear is None:
                raise
            self._end()
            raise clear from error

    def _end(self) -> None:
        """Ends the other loading processes; torch would tell of the dead one again and again."""
        with suppress(RuntimeError):
            getattr(self.batches, "_shutdown_workers", lambda: None)()
