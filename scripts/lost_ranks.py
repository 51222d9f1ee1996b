"""What a rank says when another is gone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fewstep.errors import FewstepError

STATUS = 3  # of a process that ends since another rank is gone
# gloo and NCCL tell of a lost rank in many ways; most are plain RuntimeErrors.
SIGNS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (timeout|error|closed)|"
    r"timed out|timeout|remote process (exited|has)|connection was likely closed|"
    r"recv\w*.*failed|failed to (recv|send)|peer|aborted",
    re.IGNORECASE,
)
TRANSPORTS = re.compile(r"gloo|nccl|TCPStore|rendezvous|process group|c10d", re.IGNORECASE)


class LostRankError(FewstepError):
    """Another rank is gone; the cause is in its output."""

    status = STATUS


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is how this process learnt that another rank is gone."""
    import torch.distributed as dist

    message = str(error)
    if not isinstance(error, RuntimeError) or not dist.is_available():
        return False
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return bool(TRANSPORTS.search(message) and SIGNS.search(message))


def lost_message(met: str, known: Sequence[str]) -> str:
    """What to tell the user.

    Args:
        met: how this process learnt of it.
        known: what is known of other ranks, a phrase each.
    """
    told = f" Of this machine, {'; '.join(known)}." if known else ""
    return (
        f"Another rank of this run was lost or met an error of its own; {met}.{told}\n"
        "The first error in the output of the other ranks is the cause; if there is none, that "
        "rank was killed, most often since memory ran out (`dmesg` or the job's log tells).\n"
        "When that is mended, the same command with --ckpt_path last goes on from the newest "
        "checkpoint."
    )
