"""Ranks on this machine that end together, with a word on the first that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from scripts.lost_ranks import STATUS, lost_message

PARENT = "FEWSTEP_PARENT_OF_RANKS"
LOOK_SECONDS = 0.5
# A rank that lost another is told so by its connection, or raises the same error as the other.
# One that hangs all the same, as in NCCL's collectives, is ended after this time.
GRACE_SECONDS = 20.0

_children: list[subprocess.Popen[bytes]] = []
_leaving = threading.Event()


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine as Lightning does, and watches them differently.

    Lightning kills all ranks without a word a few seconds after one has failed, the first included;
    that can cut short a message, or the exit status of a run that was saved in time.
    """

    def _call_children_scripts(self) -> None:
        os.environ[PARENT] = str(os.getpid())
        super()._call_children_scripts()
        _children[:] = self.procs
        self.procs = []  # of which Lightning's observer sees none
        _leaving.clear()
        threading.Thread(target=_watch_children, daemon=True, name="ranks").start()

    def kill(self, signum: Any) -> None:
        """Signals the other ranks."""
        for child in _children:
            child.send_signal(signum)


def watch_ranks(strategy: Any) -> None:
    """Makes ranks that are started on this machine, by Lightning, end together.

    Args:
        strategy: of the trainer. Where other programs start the ranks, as SLURM's srun or torchrun
            do, they also end them.
    """
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = Launcher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )
    if os.environ.get("LOCAL_RANK", "0") != "0" and PARENT in os.environ:
        threading.Thread(target=_watch_parent, daemon=True, name="first rank").start()


def end_children(failed: bool) -> None:
    """Waits for the other ranks of this machine, and kills those that stay."""
    _leaving.set()
    if failed and _children:
        # They may wait for this rank: without its connections they learn that it is gone. In a
        # thread of its own, since that can hang too.
        threading.Thread(target=_disconnect, daemon=True).start()
    until = time.monotonic() + (GRACE_SECONDS if failed else 3 * GRACE_SECONDS)
    while time.monotonic() < until and any(child.poll() is None for child in _children):
        time.sleep(0.1)
    _kill_children()
    _children.clear()


def failed_children() -> list[str]:
    """What became of the ranks of this machine that failed, a phrase each."""
    return [
        f"rank process {child.pid} {_described(child.returncode)}"
        for child in _children
        if child.poll() not in (None, 0)
    ]


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _described(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, as the system does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"


def _kill_children() -> None:
    for child in _children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _watch_children() -> None:
    """In the first rank: ends the run a while after another rank failed, if it has not ended."""
    while not failed_children():
        if _leaving.wait(LOOK_SECONDS) or all(child.poll() == 0 for child in _children):
            return
    if not _leaving.wait(GRACE_SECONDS):
        found = failed_children()
        _kill_children()
        _leave(lost_message("this rank went on waiting for it", found))


def _watch_parent() -> None:
    """In another rank: ends it a while after the first has ended."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(LOOK_SECONDS)
    time.sleep(GRACE_SECONDS)
    _leave(lost_message("the first rank of this machine ended", []))


def _leave(message: str) -> None:
    """Ends this process from any thread, whatever the others wait for."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(STATUS)
