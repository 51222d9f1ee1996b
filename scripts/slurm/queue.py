"""What SLURM knows of jobs."""

from __future__ import annotations

import shutil
import subprocess


def queued() -> dict[str, str]:
    """The state of each of the user's jobs in the queue, by id; tasks of arrays as ``7_2``."""
    return _table("squeue", "--me", "--array", "--noheader", "--format=%i|%T")


def accounted(jobs: list[str]) -> dict[str, str]:
    """The final state of jobs, where the cluster keeps accounts; empty where it does not."""
    if not jobs:
        return {}
    wanted = f"--jobs={','.join(jobs)}"
    return _table("sacct", wanted, "--allocations", "--noheader", "-P", "--format=JobID,State")


def _table(command: str, *arguments: str) -> dict[str, str]:
    if shutil.which(command) is None:
        return {}
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    # "CANCELLED by 1000" is CANCELLED.
    return {row[0].strip(): row[1].split()[0] for row in rows if len(row) == 2 and row[1].split()}
