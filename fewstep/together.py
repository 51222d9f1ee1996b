"""Work of several processes whose failure anywhere is everyone's."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

from fewstep.errors import FewstepError
from fewstep.remembered import REMEMBERED

T = TypeVar("T")


def attempt(work: Callable[[], T] | None) -> tuple[T | None, Exception | None]:
    """What the work returned, or the error it raised; neither if there is none for this rank."""
    if work is None:
        return None, None
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other ranks wait
        # What filled a GPU must not be held by the frames of the error that says so.
        traceback.clear_frames(error.__traceback__)
        return None, error


def complaint(rank: int, error: Exception | None) -> str | None:
    """What the other ranks say of an error."""
    if error is None or isinstance(error, FewstepError):
        return None if error is None else str(error)
    return (
        f"Rank {rank} failed and the others stop with it; its own message says "
        f"where ({type(error).__name__}: {error})."
    )


def raise_with_all(error: Exception | None, complaints: Sequence[str | None]) -> None:
    """Raises this rank's error, or else the first of what others complain of.

    Raises:
        FewstepError: what another rank complains of.
    """
    if error is not None:
        raise error
    found = next((said for said in complaints if said is not None), None)
    if found is not None:
        raise FewstepError(found)


def gathered(value: T) -> list[T]:
    """All ranks' values, a collective; this process's alone where there are no others."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def in_turn(work: Callable[[], T]) -> T:
    """What this rank's ``work()`` returns; a collective where there is a process group.

    Each machine's first rank works first. What it remembers of files
    (:mod:`fewstep.remembered`), which every rank would find alike, it tells the machine's other
    ranks before they begin; machines may have files of their own. Within ``work()`` must be no
    collective.

    Raises:
        FewstepError: on all ranks, if it failed on any; where another error arose, that error
            itself.
    """
    hosts = gathered(socket.gethostname())
    if len(hosts) == 1:
        return work()
    rank = dist.get_rank()
    first = hosts.index(hosts[rank])
    value, error = attempt(work if rank == first else None)
    raise_with_all(error, gathered(complaint(rank, error)))
    for teller in sorted({hosts.index(host) for host in hosts}):
        told: list[dict[Hashable, Any]] = [REMEMBERED.known() if rank == teller else {}]
        dist.broadcast_object_list(told, src=teller)
        if teller == first:
            REMEMBERED.learn(told[0])
    if rank != first:
        value, error = attempt(work)
    raise_with_all(error, gathered(complaint(rank, error)))
    return cast(T, value)


def same_everywhere(value: T, what: str) -> T:
    """A value that must be the same on all ranks; a collective where there is a process group.

    Args:
        what: whose value, as the start of the error's sentence.

    Raises:
        FewstepError: on all ranks, if it differs.
    """
    found = gathered((value, socket.gethostname()))
    others = [host for other, host in found if other != found[0][0]]
    if others:
        raise FewstepError(
            f"{what} is not the same on all machines: on {others[0]} it is not what it is on "
            f"{found[0][1]}. Copy it again from one to the other, or use a file system that all "
            "share."
        )
    return value
