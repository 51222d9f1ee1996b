"""Runs a function on several ranks, gloo processes of this machine, and returns what each gives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], given: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",  # by which Lightning knows that ranks are already started
    )
    try:
        result = ("ok", work(*given))
    except BaseException:
        result = ("failed", traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)  # without the parent's exit handlers


def in_group(work: Callable[..., Any], *given: Any) -> Any:
    """Calls ``work(*given)`` on a rank whose process group is ready, without Lightning."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return work(*given)
    finally:
        dist.destroy_process_group()


def _kill(processes: Sequence[Any], when: Callable[[], bool]) -> None:
    while not when():
        assert all(process.is_alive() for process in processes), "a rank ended by itself"
        time.sleep(0.001)
    for process in processes:
        process.kill()


def _failures(folder: str) -> str:
    return "\n".join(str(pickle.loads(file.read_bytes())) for file in Path(folder).iterdir())


def run_ranks(
    world_size: int,
    work: Callable[..., Any],
    *given: Any,
    timeout: float = 120,
    dies: bool = False,
    kill_when: Callable[[], bool] | None = None,
) -> Any:
    """Calls ``work(*given)`` on every rank; returns their results in the order of ranks.

    Forked, so that nothing is imported again. With ``dies``, all ranks must be killed; with
    ``kill_when``, they are, once that is true.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, world_size, port, folder, work, given))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        if kill_when is not None:
            _kill(processes, kill_when)
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                for one in processes:
                    one.kill()
                raise TimeoutError(f"a rank did not finish within {timeout} s")
        if dies:
            codes = [process.exitcode for process in processes]
            assert codes == [-9] * world_size, f"{codes}: {_failures(folder)}"
            return []
        found = []
        for rank in range(world_size):
            file = Path(folder, str(rank))
            assert file.exists(), f"rank {rank} died"
            state, result = pickle.loads(file.read_bytes())
            assert state == "ok", f"rank {rank}:\n{result}"
            found.append(result)
        return found
