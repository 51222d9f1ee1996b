"""Work of one rank, of one of each machine, or of all; its failure anywhere is everyone's."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch.distributed as dist

from fewstep.errors import FewstepError

T = TypeVar("T")


def on_first_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What the first rank's ``work()`` returns, on all ranks; a collective.

    Raises:
        FewstepError: on all ranks, if it failed; where another error arose, that error itself.
    """
    value, error = _attempt(work if trainer.is_global_zero else None)
    found, complaint = trainer.strategy.broadcast((value, _complaint(trainer, error)))
    _raise(error, complaint)
    return cast(T, found)


def on_each_machine(trainer: pl.Trainer, work: Callable[[], Any]) -> None:
    """Runs ``work()`` once on each machine before any rank goes on; a collective.

    Raises:
        FewstepError: on all ranks, if it failed anywhere; where another error arose, that error
            itself.
    """
    _settle(trainer, _attempt(work if trainer.local_rank == 0 else None)[1])


def on_every_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What this rank's ``work()`` returns, once that of all ranks is done; a collective.

    Within ``work()`` a rank that fails cannot tell the others: if it holds collectives, such as the
    forward passes of sharded networks, they wait for it until the process group's timeout.

    Raises:
        FewstepError: on all ranks, if it failed on any; where another error arose, that error
            itself.
    """
    value, error = _attempt(work)
    _settle(trainer, error)
    return cast(T, value)


def _attempt(work: Callable[[], T] | None) -> tuple[T | None, Exception | None]:
    if work is None:
        return None, None
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other ranks wait
        # What filled a GPU must not be held by the frames of the error that says so.
        traceback.clear_frames(error.__traceback__)
        return None, error


def _settle(trainer: pl.Trainer, error: Exception | None) -> None:
    """Exchanges what went wrong, and raises it everywhere."""
    complaints = [_complaint(trainer, error)]
    if trainer.world_size > 1:
        complaints = [None] * trainer.world_size
        dist.all_gather_object(complaints, _complaint(trainer, error))
    _raise(error, next((found for found in complaints if found is not None), None))


def _complaint(trainer: pl.Trainer, error: Exception | None) -> str | None:
    """What the other ranks say of an error."""
    if error is None or isinstance(error, FewstepError):
        return None if error is None else str(error)
    return (
        f"Rank {trainer.global_rank} failed and the others stop with it; its own message says "
        f"where ({type(error).__name__}: {error})."
    )


def _raise(error: Exception | None, complaint: str | None) -> None:
    if error is not None:
        raise error
    if complaint is not None:
        raise FewstepError(complaint)
