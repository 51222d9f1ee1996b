"""Failures that come from outside the program, as messages a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks.disk import full_disk, full_reason
from datamodules.workers import explained as dead_worker
from fewstep.errors import FewstepError
from scripts.launcher import failed_children
from scripts.lost_ranks import LostRankError, is_lost_rank, lost_message


def explained(error: BaseException) -> FewstepError | None:
    """The clear message for a dead data worker, a full disk, a lost rank or what Lightning refuses.

    None for all else.

    Such errors can surface at any line: the system tells of a dead child at once, and loggers write
    in threads of their own. What was already explained before it failed on its way out, as when the
    disk is too full for the loggers to close their files, stays as it was.
    """
    clear = _explained(error)
    if clear is None:
        return None
    return next((e for e in earlier(error) if isinstance(e, FewstepError)), clear)


def earlier(error: BaseException) -> Iterator[BaseException]:
    """The errors it was raised from or during, the nearest first."""
    found = error.__cause__ or error.__context__
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _explained(error: BaseException) -> FewstepError | None:
    if (clear := dead_worker(error)) is not None:
        return clear
    if (reason := full_reason(error)) is not None:
        name = getattr(error, "filename", None)
        return full_disk(Path(name) if name else Path("runs"), reason)
    if is_lost_rank(error):
        met = f"this rank learnt of it by: {str(error).strip().splitlines()[0]}"
        return LostRankError(lost_message(met, failed_children()))
    if isinstance(error, MisconfigurationException):
        return FewstepError(f"Lightning refuses this: {in_one_line(error)}")
    return None


def in_one_line(error: BaseException) -> str:
    """What an error says, its first paragraph."""
    return " ".join(str(error).strip().split("\n\n", maxsplit=1)[0].split())
