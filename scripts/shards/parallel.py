"""Work on many shards in several processes, with a progress bar."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from threading import Event
from typing import Any, TypeVar

from tqdm import tqdm

from fewstep.errors import FewstepError

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """As many processes as this one may use cores, which in a SLURM job is its share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bar(total: int, title: str, unit: str) -> tqdm[Any]:
    """A progress bar; in a log file it prints few lines."""
    pace = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=title, unit=unit, mininterval=pace, maxinterval=pace)


def in_parallel(
    job: Callable[[T], R], items: Sequence[T], workers: int, title: str, unit: str = "shard"
) -> Iterator[R]:
    """The results of a job for each item, in the items' order.

    Args:
        job: what to do; it and the items travel to other processes.
        items: one piece of work each.
        workers: processes; with 1 the work is done in this one.
        title: names the progress bar.
        unit: what an item is.

    Raises:
        FewstepError: if a process was killed.
    """
    with bar(len(items), title, unit) as progress:
        if min(workers, len(items)) <= 1:
            for item in items:
                result = job(item)
                progress.update()
                yield result
            return
        yield from _pooled(job, items, min(workers, len(items)), progress)


def fork_server() -> BaseContext:
    """How processes are started.

    A fork server imports once, and has no threads that its children could inherit half-way.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["datamodules", "scripts.shards.parallel"])
    return context


def _pooled(
    job: Callable[[T], R], items: Sequence[T], workers: int, progress: tqdm[Any]
) -> Iterator[R]:
    pool = ProcessPoolExecutor(workers, fork_server(), initializer=_leave_interrupts_alone)
    try:
        futures: list[Future[R] | None] = []
        for item in items:
            future = pool.submit(partial(_interruptible, job), item)
            future.add_done_callback(_counting(progress))
            futures.append(future)
        for number, awaited in enumerate(futures):
            assert awaited is not None
            yield awaited.result()
            futures[number] = None  # its result may be large
    except BrokenProcessPool as error:
        raise FewstepError(
            "A worker process was killed, most likely for want of memory. Use fewer --workers; "
            "what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _counting(progress: tqdm[Any]) -> Callable[[Future[Any]], None]:
    def count(done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            progress.update()

    return count


def _leave_interrupts_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_interrupted = Event()


def _interruptible(job: Callable[[T], R], item: T) -> R:
    """Lets Ctrl-C stop the job, which cleans up, but not an idle process, which would complain."""
    if _interrupted.is_set():
        raise KeyboardInterrupt  # this item was on its way already
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return job(item)
    except KeyboardInterrupt:
        _interrupted.set()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
