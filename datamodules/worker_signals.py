"""Signals to a whole job are for the training process to answer; loading processes work on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

JOB_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
# How soon a loading process notices that the training process is dead, even amid a long read.
LOOK_SECONDS = 2.0
# Elsewhere a process cannot learn who sent a signal, and torch's own ways stay.
SUPPORTED = hasattr(signal, "sigtimedwait")


@contextmanager
def held_back() -> Iterator[None]:
    """Lets processes begin that hold these signals back from their first moment.

    The training process gets its own as soon as they have begun.
    """
    if not SUPPORTED:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_training() -> None:
    """Makes this loading process end with the training process or at its SIGTERM, no other's.

    SLURM, launchers and shells signal all processes of a job. torch lets a loading process die of
    that, and raises in the training process at whatever line the system tells it of the death,
    which is before it could save.
    """
    training = multiprocessing.parent_process()
    if training is None or not SUPPORTED:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    # In a thread, which works while the main one reads, and learns the sender.
    listener = threading.Thread(target=_listen, args=(training.pid, os.getppid()), daemon=True)
    listener.start()


def _listen(training: int, parent: int) -> None:
    """Ends this process when it is told to, or is an orphan; with forkserver the two differ."""
    while os.getppid() == parent:
        told = signal.sigtimedwait(JOB_SIGNALS, LOOK_SECONDS)
        if told is not None and (told.si_signo, told.si_pid) == (signal.SIGTERM, training):
            break
    os._exit(0)
