"""What a user reads when a disk is full, wherever the run meets it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from fewstep.errors import FewstepError

# No space, a used-up quota, a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's archive writer does not hand on what the system said.
WRITER = ("PytorchStreamWriter failed writing", "unexpected pos")
# Batches on their way between processes; /dev/shm is not the disk that runs write to.
SHARED_MEMORY = "shared memory"
GIB = 2**30


def full_reason(error: BaseException | None) -> str | None:
    """What the system said, if the error means that a disk is full; looks into its causes too.

    The ranks of a sharded checkpoint tell one another of their errors by a CheckpointException.
    """
    if error is None or SHARED_MEMORY in str(error):
        return None
    if isinstance(error, OSError):
        return error.strerror if error.errno in FULL else None
    if isinstance(error, CheckpointException):
        reasons = [full_reason(failure) for failure, _ in error.failures.values()]
        return next((reason for reason in reasons if reason), None)
    earlier = error.__cause__ or error.__context__
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in WRITER):
        # Of another reason, such as a broken disk, there is no more to say here.
        told_otherwise = isinstance(earlier, OSError) and earlier.errno not in FULL
        return None if told_otherwise else full_reason(earlier) or "it could not be written whole"
    return full_reason(earlier)


def full_disk(path: Path, reason: str, needed: int | None = None) -> FewstepError:
    """The error that says which disk is full and how to go on.

    Args:
        path: what was to be written.
        reason: what the system said.
        needed: bytes that what was to be written takes, if known.
    """
    folder = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path())
    try:
        free = f"{shutil.disk_usage(folder).free / GIB:.2f} GiB are free there"
    except OSError:
        free = "how much is free there is unknown"
    wanted = f"; about {needed / GIB:.2f} GiB are needed" if needed else ""
    return FewstepError(
        f"'{path}' could not be written: {reason}. {free}{wanted}.\n"
        "Make room on that disk (or raise the quota, or `ulimit -f`); callbacks.Checkpoints with "
        "a smaller `keep` needs less.\nThen the same command with --ckpt_path last goes on from "
        "the newest checkpoint; those there are were left alone."
    )


@contextmanager
def explained_when_full(path: Path) -> Iterator[None]:
    """Within it, an error that means a full disk becomes one that says what to do.

    Args:
        path: what is written.

    Raises:
        FewstepError: if the disk is full; other errors pass.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = full_reason(error)
        if reason is None:
            raise
        raise full_disk(path, reason) from error


def first_reason(mine: str | None, world_size: int) -> str | None:
    """The first rank's reason of all that have one, the same on every rank; a collective."""
    reasons: list[str | None] = [mine]
    if world_size > 1:
        reasons = [None] * world_size
        dist.all_gather_object(reasons, mine)
    return next((reason for reason in reasons if reason), None)
