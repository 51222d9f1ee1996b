"""Runs that are killed, whole or in part, and resumed, through the command a user would type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from key_log import read_log

ROOT = Path(__file__).resolve().parents[2]
EVERY, LAST, BATCH = 5, 40, 32
CONFIG = """
trainer:
  max_steps: {last}
  accelerator: cpu
  val_check_interval: 1000000
  callbacks:
    - class_path: key_log.KeyLog
      init_args: {{path: {log}}}
    - class_path: callbacks.Checkpoints
      init_args: {{every_n_updates: {every}}}
model: {{init_args: {{backbone: {{init_args: {{num_layers: 1, head_dim: 8}}}}}}}}
data: {{init_args: {{folder: {folder}/digits, batch_size: {batch}, num_workers: 2}}}}
"""


def begin(folder: Path, name: str, *more: str) -> subprocess.Popen[bytes]:
    config = folder / f"{name}.yaml"
    log = folder / f"{name}.log"
    config.write_text(CONFIG.format(last=LAST, log=log, every=EVERY, folder=folder, batch=BATCH))
    arguments = ["fit", "-c", "digits/teacher", "-c", str(config), "--run.name", name]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.main", *arguments, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # so that its workers are killed with it
        stdout=(folder / f"{name}.out").open("ab"),
        stderr=subprocess.STDOUT,
    )


def finish(folder: Path, name: str, *more: str) -> None:
    run = begin(folder, name, *more)
    assert run.wait(timeout=240) == 0, (folder / f"{name}.out").read_text()[-3000:]


def begin_and_wait(folder: Path, name: str, updates: int, *more: str) -> subprocess.Popen[bytes]:
    """A run that has come so far."""
    run = begin(folder, name, *more)
    log = folder / f"{name}.log"
    while not log.exists() or len(read_log(log)) < updates:
        assert run.poll() is None, (folder / f"{name}.out").read_text()[-3000:]
        time.sleep(0.005)
    return run


def kill_after(folder: Path, name: str, updates: int) -> None:
    run = begin_and_wait(folder, name, updates)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_samples_of_the_undisturbed_one(tmp_path: Path) -> None:
    finish(tmp_path, "whole")
    kill_after(tmp_path, "killed", 2 * EVERY + 3)
    before = read_log(tmp_path / "killed.log")
    assert len(before) < LAST
    finish(tmp_path, "killed", "--ckpt_path", "last")
    whole, killed = read_log(tmp_path / "whole.log"), read_log(tmp_path / "killed.log")
    assert killed == whole
    assert len(whole) == LAST
    assert all(before[key] == whole[key] for key in before), "the killed run read other samples"


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_ranks_and_finishes_the_epoch(tmp_path: Path) -> None:
    kill_after(tmp_path, "killed", 2 * EVERY + 3)
    saved = sorted((tmp_path / "runs/killed/version_0/checkpoints").glob("update_*.ckpt"))[-1]
    done = int(saved.stem.removeprefix("update_"))
    alone = read_log(tmp_path / "killed.log")
    (tmp_path / "killed.log").unlink()
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    finish(tmp_path, "killed", "--ckpt_path", "last", *two)
    together = read_log(tmp_path / "killed.log")
    seen = [key for update in range(1, done + 1) for key in alone[update, 0]]
    for update in range(done + 1, LAST + 1):
        first, second = together[update, 0], together[update, 1]
        assert len(first) == len(second) == BATCH
        seen += first + second
    epoch = 1617
    assert len(seen) > 1.3 * epoch
    assert len(set(seen[:epoch])) == epoch, "a sample was seen twice or lost"
    assert len(set(seen[epoch : 2 * epoch])) == len(seen[epoch : 2 * epoch])


# ---------------------------------------------------------------------- a part of a run is killed

LONG = ["--trainer.max_steps", "100000"]
TWO = ["--trainer.devices", "2", "--trainer.strategy"]
DDP = [*TWO, "ddp"]


def processes_of(run: subprocess.Popen[bytes]) -> dict[int, str]:
    """Command lines of all living processes of a run, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent_and_more = (folder / "stat").read_text().rpartition(")")[2].split(None, 1)
            if state != "Z" and int(parent_and_more.split()[2]) == run.pid:  # its session
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def children_of(parent: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{parent}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def wait_until_none_is_left(run: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while processes_of(run) and time.monotonic() < until:
        time.sleep(0.1)
    left = processes_of(run)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left, f"orphans: {left}"


def output_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.out").read_text()


def finish_soon_after(folder: Path, name: str, *more: str) -> None:
    """Resumes a run and lets it make a few updates more."""
    checkpoints = folder / f"runs/{name}/version_0/checkpoints"
    done = int((checkpoints / "last.ckpt").resolve().stem.removeprefix("update_"))
    goal = ["--trainer.max_steps", str(done + 2 * EVERY)]
    finish(folder, name, "--ckpt_path", "last", *more, *goal)
    assert (checkpoints / "last.ckpt").resolve().stem == f"update_{done + 2 * EVERY:08d}"


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_in_one_message_and_it_goes_on(tmp_path: Path) -> None:
    run = begin_and_wait(tmp_path, "worker", EVERY + 1, *LONG)
    os.kill(children_of(run.pid)[0], signal.SIGKILL)
    assert run.wait(timeout=60) == 2
    said = output_of(tmp_path, "worker")
    assert "error: A data-loading process is killed by SIGKILL" in said
    assert "data.init_args.num_workers" in said
    assert "Traceback" not in said[said.index("error:") :]
    wait_until_none_is_left(run, 15)
    finish_soon_after(tmp_path, "worker")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [("SIGTERM", []), ("SIGUSR1", []), ("SIGTERM", DDP)])
def test_a_signal_to_the_whole_job_with_its_data_workers_has_it_save_and_leave(
    number: str, ranks: list[str], tmp_path: Path
) -> None:
    run = begin_and_wait(tmp_path, "group", 2 * EVERY, *LONG, *ranks)
    os.killpg(run.pid, signal.Signals[number])
    assert run.wait(timeout=60) == 75, output_of(tmp_path, "group")[-3000:]
    checkpoints = tmp_path / "runs/group/version_0/checkpoints"
    done = int((checkpoints / "last.ckpt").resolve().stem.removeprefix("update_"))
    assert f"Asked to stop: saved update {done}." in output_of(tmp_path, "group")
    wait_until_none_is_left(run, 15)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_lost_rank_ends_all_ranks_in_one_message_and_the_run_goes_on(
    strategy: str, tmp_path: Path
) -> None:
    run = begin_and_wait(tmp_path, "lost", 2 * (EVERY + 1), *LONG, *TWO, strategy)
    second = [n for n in children_of(run.pid) if "LOCAL_RANK=1\0" in environment_of(n)]
    os.kill(second[0], signal.SIGKILL)
    assert run.wait(timeout=60) == 3
    said = output_of(tmp_path, "lost")
    assert said.count("error: Another rank of this run was lost or met an error of its own") == 1
    assert f"rank process {second[0]} was killed by SIGKILL" in said
    assert "--ckpt_path last" in said
    wait_until_none_is_left(run, 40)
    finish_soon_after(tmp_path, "lost", *TWO, strategy)


def environment_of(process: int) -> str:
    return Path(f"/proc/{process}/environ").read_text()


@pytest.mark.slow
def test_no_rank_is_left_behind_when_the_first_is_killed(tmp_path: Path) -> None:
    run = begin_and_wait(tmp_path, "first", 2 * (EVERY + 1), *LONG, *TWO, "ddp")
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_until_none_is_left(run, 40)
    assert "error: Another rank of this run was lost" in output_of(tmp_path, "first")
