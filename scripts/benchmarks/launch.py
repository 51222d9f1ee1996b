"""The ranks of a measurement: processes of this machine, and what each of them found."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from fewstep.errors import FewstepError

GRACE = 2.0  # seconds in which the other ranks may end by themselves once one has failed


def launch(work: Callable[..., Any], ranks: int, device: str, *given: Any) -> list[Any]:
    """Calls ``work(*given)`` in a new process a rank; returns their results in that order.

    Args:
        work: a function of a module; what it returns must be plain values.
        ranks: number of processes.
        device: ``cpu`` or ``cuda``; processes that use CUDA cannot be forked.
        given: what to call it with.

    Raises:
        FewstepError: with the traceback of the rank that failed; the others are ended.
    """
    method = "fork" if device == "cpu" and sys.platform == "linux" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _rank,
            args=(ranks, _free_port(), folder, work, given),
            nprocs=ranks,
            join=False,
            start_method=method,
        )
        assert context is not None
        try:
            while not context.join(grace_period=GRACE):
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise FewstepError(f"A rank failed.{error}") from error
        finally:
            for process in context.processes:
                process.kill()
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    Path(folder, str(rank)).write_text(json.dumps(work(*given)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
