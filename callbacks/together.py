"""Work of one rank, of one of each machine, or of all; its failure anywhere is everyone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning.pytorch as pl

from fewstep.together import attempt, complaint, gathered, raise_with_all

T = TypeVar("T")


def on_first_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What the first rank's ``work()`` returns, on all ranks; a collective.

    Raises:
        FewstepError: on all ranks, if it failed; where another error arose, that error itself.
    """
    value, error = attempt(work if trainer.is_global_zero else None)
    said = complaint(trainer.global_rank, error)
    found, said = trainer.strategy.broadcast((value, said))
    raise_with_all(error, [said])
    return cast(T, found)


def on_each_machine(trainer: pl.Trainer, work: Callable[[], Any]) -> None:
    """Runs ``work()`` once on each machine before any rank goes on; a collective.

    Raises:
        FewstepError: on all ranks, if it failed anywhere; where another error arose, that error
            itself.
    """
    _settle(trainer, attempt(work if trainer.local_rank == 0 else None)[1])


def on_every_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What this rank's ``work()`` returns, once that of all ranks is done; a collective.

    Within ``work()`` a rank that fails cannot tell the others: if it holds collectives, such as the
    forward passes of sharded networks, they wait for it until the process group's timeout.

    Raises:
        FewstepError: on all ranks, if it failed on any; where another error arose, that error
            itself.
    """
    value, error = attempt(work)
    _settle(trainer, error)
    return cast(T, value)


def _settle(trainer: pl.Trainer, error: Exception | None) -> None:
    """Exchanges what went wrong, and raises it everywhere."""
    said = complaint(trainer.global_rank, error)
    raise_with_all(error, gathered(said) if trainer.world_size > 1 else [said])
