"""Failures from outside the program: which are explained, and ranks that end together."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fewstep.errors import FewstepError
from scripts import main as front_door
from scripts.failures import explained
from scripts.lost_ranks import LostRankError

from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def lose_the_other(folder: Path) -> str:
    """The first rank ends; the second waits for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
        return ""
    dist.barrier()
    time.sleep(1)
    try:
        dist.barrier()
    except RuntimeError as error:
        clear = explained(error)
        return f"{type(clear).__name__}: {clear}"
    return "nothing was lost"


def test_a_closed_connection_is_explained_as_a_lost_rank(tmp_path: Path) -> None:
    said = run_ranks(2, lose_the_other, tmp_path)[1]
    assert said.startswith("LostRankError: Another rank of this run was lost or met an error")
    assert "output of the other ranks" in said
    assert "--ckpt_path last" in said


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer"),
        RuntimeError("CUDA out of memory"),
        RuntimeError("the source timed out"),
        OSError(errno.EACCES, "Permission denied"),
    ],
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    assert explained(error) is None


def test_what_was_explained_first_stays() -> None:
    first = FewstepError("the cause")
    late = OSError(errno.ENOSPC, "No space left on device")
    late.__context__ = first
    assert explained(late) is first


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "'runs/x' could not be"),
        (dist.DistNetworkError("gone"), 3, "Another rank"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2, "SIGKILL"),
    ],
)
def test_the_front_door_prints_one_message_and_a_status(
    error: Exception,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(front_door, "run", fail)
    assert front_door.main(["fit"]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert "Traceback" not in said
    assert isinstance(explained(error), LostRankError) == (status == 3)


HANGING = """
import subprocess, sys, threading, time
from scripts import launcher
launcher.GRACE_SECONDS = 0.5
hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
killed = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
launcher._children[:] = [hanging, killed]
print(hanging.pid, killed.pid, flush=True)
threading.Thread(target=launcher._watch_children, daemon=True).start()
time.sleep(100)
"""


@pytest.mark.slow
def test_a_first_rank_that_waits_for_ever_is_ended_after_another_was_lost() -> None:
    """As in NCCL, whose collectives wait on for a rank that is gone."""
    found = subprocess.run(
        [sys.executable, "-c", HANGING],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=ROOT,
    )
    hanging, killed = found.stdout.split()
    assert found.returncode == 3, found.stderr
    assert f"rank process {killed} was killed by SIGKILL" in found.stderr
    assert not Path(f"/proc/{hanging}").exists(), "an orphan was left"
