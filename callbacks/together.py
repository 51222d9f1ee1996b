"""Work that one rank, or one of each machine, does for all; its failure is everyone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch.distributed as dist

from fewstep.errors import FewstepError

T = TypeVar("T")


def on_first_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What the first rank's ``work()`` returns, on all ranks; a collective.

    Raises:
        FewstepError: on all ranks, if it raised one.
    """
    outcome: tuple[T | None, str | None] = (None, None)
    if trainer.is_global_zero:
        outcome = _outcome(work)
    value, complaint = trainer.strategy.broadcast(outcome)
    if complaint is not None:
        raise FewstepError(complaint)
    return cast(T, value)


def on_each_machine(trainer: pl.Trainer, work: Callable[[], Any]) -> None:
    """Runs ``work()`` once on each machine before any rank goes on; a collective.

    Raises:
        FewstepError: on all ranks, if it raised one anywhere.
    """
    complaint = _outcome(work)[1] if trainer.local_rank == 0 else None
    complaints = [complaint]
    if trainer.world_size > 1:
        complaints = [None] * trainer.world_size
        dist.all_gather_object(complaints, complaint)
    for found in complaints:
        if found is not None:
            raise FewstepError(found)


def _outcome(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except FewstepError as error:
        return None, str(error)
