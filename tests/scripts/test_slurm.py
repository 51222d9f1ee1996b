"""A preempted job on a real SLURM of two virtual nodes, through the commands a user would type."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from datamodules.digits import write_digit_shards
from scripts.main import run
from scripts.slurm.status import newest_update, statuses

from key_log import read_log

ROOT = Path(__file__).resolve().parents[2]
MINI_SLURM = ROOT / "tests" / "mini_slurm.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munge")
LAST = 200
CONFIG = """
trainer:
  max_steps: {last}
  val_check_interval: 1000000
  log_every_n_steps: 5
  callbacks:
    - class_path: key_log.KeyLog
      init_args: {{path: {folder}/{name}.log}}
    - class_path: callbacks.Checkpoints
      init_args: {{every_n_updates: 100000}}
model: {{init_args: {{backbone: {{init_args: {{num_layers: 1, head_dim: 8}}}}}}}}
data: {{init_args: {{folder: {folder}/digits, batch_size: 16, num_workers: 1}}}}
"""


def three_free_ports() -> int:
    """The first of three ports in a row that nothing listens on."""
    for port in range(20000 + os.getpid() % 5000, 32000, 3):
        try:
            with ExitStack() as held:
                for number in range(port, port + 3):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
                return port
        except OSError:
            continue
    raise OSError("no free ports")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running SLURM, as ``SLURM_CONF`` names it."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed here: there is no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("starting a SLURM needs root")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the virtual nodes' names do not resolve
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        try:
            subprocess.run([MINI_SLURM, "start", folder, str(three_free_ports())], check=True)
            yield folder
        finally:
            subprocess.run([MINI_SLURM, "stop", folder], check=True)


def submit(folder: Path, name: str) -> Path:
    """Submits a small run on two nodes; returns its folder."""
    (folder / f"{name}.yaml").write_text(CONFIG.format(folder=folder, name=name, last=LAST))
    size = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-gpu", "1", "--time", "10"]
    run(["submit", "-c", "digits/teacher", "-c", f"{name}.yaml", "--run.name", name, *size])
    return folder / "runs" / name / "version_0"


def logs(run_folder: Path) -> str:
    return "\n".join(p.read_text()[-2000:] for p in sorted((run_folder / "slurm").glob("*.out")))


def wait_for(what: str, ready: Callable[[], bool], run_folder: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited in vain for {what}:\n{logs(run_folder)}"
        time.sleep(0.1)


def left_with(run_folder: Path, status: int) -> bool:
    """Whether the batch script has ended; with another status than expected the test fails."""
    path = run_folder / "slurm" / "exit"
    found = path.read_text().strip() if path.exists() else ""
    assert found in ("", "75", str(status)), f"it left with {found}:\n{logs(run_folder)}"
    return found == str(status)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preempted_job_comes_back_and_ends_with_the_weights_of_an_undisturbed_one(
    slurm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digit_shards(tmp_path / "digits")
    whole, cut = submit(tmp_path, "whole"), submit(tmp_path, "cut")
    job = json.loads((cut / "slurm" / "job.json").read_text())["job"]

    wait_for("20 updates", lambda: newest_update(cut) >= 20, cut)
    assert [s.state for s in statuses(tmp_path / "runs" / "cut")] == ["RUNNING"]
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_for("the first start to end", lambda: left_with(cut, 75), cut)
    saved = sorted((cut / "checkpoints").glob("update_*.ckpt"))[-1]
    stopped_at = int(saved.stem.removeprefix("update_"))
    assert 20 <= stopped_at < LAST
    wait_for("the end", lambda: left_with(cut, 0), cut)
    wait_for("the end of the undisturbed run", lambda: left_with(whole, 0), whole)

    assert f"saved update {stopped_at}" in logs(cut)
    shown = subprocess.run(
        ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
    )
    assert "Restarts=1" in shown.stdout
    assert not (cut.parent / "version_1").exists()
    wait_for(
        "the queue to empty",
        lambda: {s.state for s in statuses(tmp_path / "runs")} == {"COMPLETED"},
        cut,
    )
    capsys.readouterr()
    run(["submit", "--status"])
    assert f"update_{LAST:08d}.ckpt" in capsys.readouterr().out

    keys = read_log(tmp_path / "cut.log")
    assert set(keys) == {(n, rank) for n in range(1, LAST + 1) for rank in (0, 1)}
    assert keys == read_log(tmp_path / "whole.log")
    ended = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (whole, cut)
    ]
    assert [checkpoint["global_step"] for checkpoint in ended] == [LAST, LAST]
    torch.testing.assert_close(ended[1]["state_dict"], ended[0]["state_dict"], rtol=0, atol=0)


SUITE = """
name: tiny
seeds: [0, 1]
set:
  trainer.max_steps: 6
  trainer.val_check_interval: 1000000
  trainer.callbacks.Evaluation.metrics: [{{class_path: fewstep.metrics.SlicedWasserstein}}]
  trainer.callbacks.Evaluation.num_samples: 64
  data.init_args: {{folder: {folder}/digits, batch_size: 16, num_workers: 0}}
experiments:
  - experiment: digits/teacher
    set: {{model.init_args.backbone.init_args: {{num_layers: 1, head_dim: 8}}}}
    steps: [2]
  - {{experiment: digits/lcm, after: teacher, steps: [2]}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_suite_waits_for_its_teachers_and_ends_in_the_report(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digit_shards(tmp_path / "digits")
    Path("tiny.yaml").write_text(SUITE.format(folder=tmp_path))
    size = ["--gpus-per-node", "0", "--cpus-per-gpu", "1", "--time", "10"]
    run(["suite", "tiny.yaml", "--submit", *size])
    home = tmp_path / "runs" / "tiny"
    jobs = subprocess.run(
        ["squeue", "--noheader", "--format=%E"], capture_output=True, text=True, check=True
    )
    assert "aftercorr" in jobs.stdout
    wait_for("the report", (home / "report.html").exists, home / "lcm" / "seed_0")
    ended = {path.parts[-4]: path.stat().st_mtime for path in home.glob("*/seed_1/slurm/exit")}
    assert ended["teacher"] <= ended["lcm"]
    capsys.readouterr()
    run(["suite", "tiny.yaml", "--dry-run"])
    assert capsys.readouterr().out.count("done") == 4
    assert "2 training seeds" in (home / "summary.md").read_text()
