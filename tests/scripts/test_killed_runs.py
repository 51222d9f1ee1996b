"""A run that is killed and resumed, through the command a user would type."""

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


def kill_after(folder: Path, name: str, updates: int) -> None:
    run = begin(folder, name)
    log = folder / f"{name}.log"
    while not log.exists() or len(read_log(log)) < updates:
        assert run.poll() is None, (folder / f"{name}.out").read_text()[-3000:]
        time.sleep(0.005)
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
