"""``fewstep suite`` on this machine: what runs, what fails, what is blocked, what goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks.finite import EXIT_STATUS as NOT_FINITE
from fewstep.errors import FewstepError
from scripts.main import main, run
from scripts.suite import local
from scripts.suite.plan import Cell
from scripts.suite.summary import summary

from suites import HOME, finish, plan, states, train, write_suite

ROOT = Path(__file__).resolve().parents[2]
STUDENT = {"experiment": "digits/lcm", "after": "teacher"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a suite of a teacher, its student and a run of its own."""
    monkeypatch.chdir(tmp_path)
    alone = {"experiment": "digits/teacher", "label": "alone"}
    write_suite(experiments=["digits/teacher", STUDENT, alone])
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The arguments of each run that was started, by label; every run ends well at once."""
    return in_place_of_processes(monkeypatch, lambda cell: 0)


def in_place_of_processes(
    monkeypatch: pytest.MonkeyPatch, training: Callable[[Cell], int]
) -> dict[str, list[str]]:
    """Runs ``training``, which gives an exit status, where the suite would start a process."""
    started: dict[str, list[str]] = {}

    def run_process(arguments: list[str], cell: Cell, *rest: Any) -> int:
        started[cell.variant.label] = arguments
        status = training(cell)
        if status == 0:
            finish(cell)
        return status

    monkeypatch.setattr(local, "run_process", run_process)
    return started


# ---------------------------------------------------------------------- what is run


def test_what_is_done_is_not_run_again_and_the_report_is_written(
    here: Path, started: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(["suite", "x.yaml"])
    assert list(started) == ["teacher", "lcm", "alone"]
    assert (HOME / "report.html").exists()
    assert "| lcm | 1.000 |" in (HOME / "summary.md").read_text()
    assert "| lcm | 1.000 |" in capsys.readouterr().out
    started.clear()
    (HOME / "report.html").unlink()
    run(["suite", "x.yaml"])
    assert not started
    assert (HOME / "report.html").exists()


@pytest.mark.slow
def test_a_run_resumes_and_one_that_is_trained_is_measured_alone(
    here: Path, started: dict[str, list[str]]
) -> None:
    teacher, student, _ = plan().cells
    train(teacher)
    train(student, update=3)
    run(["suite", "x.yaml", "--only", "lcm"])
    config = "runs/x/{}/seed_0/local/config.yaml"
    assert started == {
        "teacher": ["evaluate", "-c", config.format("teacher"), "--run.version", "seed_0"],
        "lcm": [
            "fit",
            "-c",
            config.format("lcm"),
            "--run.version",
            "seed_0",
            "--ckpt_path",
            "last",
        ],
    }


@pytest.mark.slow
def test_a_failure_blocks_what_needs_it_and_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cell: Cell) -> int:
        (cell.folder / "local" / "fit.out").write_text("calm\nerror: no more digits\n")
        return int(cell.variant.label == "teacher")

    started = in_place_of_processes(monkeypatch, fail)
    assert main(["suite", "x.yaml"]) == 2
    assert list(started) == ["teacher", "alone"]
    said = capsys.readouterr()
    assert "2 of 3 runs are not done" in said.err
    assert "teacher, seed 0 failed (status 1); runs/x/teacher/seed_0/local/fit.out ends" in said.err
    assert "error: no more digits" in said.err
    assert "lcm, seed 0 is blocked: teacher, seed 0 failed." in said.err
    assert "| alone | 1.000 |" in said.out, "the report of what is done"
    assert states(plan())["teacher, seed 0"] == "failed"

    started.clear()
    assert main(["suite", "x.yaml", "--stop-on-failure", "--runs", "runs/y"]) == 2
    assert list(started) == ["teacher"]


def test_a_run_that_ends_without_results_has_failed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_processes(monkeypatch, lambda cell: 0)
    monkeypatch.setattr(f"{__name__}.finish", lambda cell: train(cell, update=5))
    with pytest.raises(FewstepError, match="3 of 3 runs are not done"):
        run(["suite", "x.yaml"])


def test_a_run_that_was_asked_to_stop_is_not_done_and_not_failed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(cell: Cell) -> int:
        train(cell, update=5)
        return 75

    in_place_of_processes(monkeypatch, stop)
    with pytest.raises(FewstepError, match="alone, seed 0 is partly: at update 5 of 3000"):
        run(["suite", "x.yaml"])


@pytest.mark.slow
def test_changed_runs_are_refused_before_anything_runs(
    here: Path, started: dict[str, list[str]]
) -> None:
    finish(plan().cells[0])
    write_suite(
        experiments=[
            "digits/lcm",
            {"experiment": "digits/teacher", "set": {"trainer.max_steps": 9}},
        ]
    )
    with pytest.raises(FewstepError, match=r"trainer\.max_steps 3000 → 9[^$]*--fresh runs them"):
        run(["suite", "x.yaml"])
    assert not started
    run(["suite", "x.yaml", "--fresh"])
    assert "seed_0_version_1" in started["teacher"]


@pytest.mark.slow
def test_one_task_can_be_run_by_its_number(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("scripts.suite.command.run_command", called.append)
    assert main(["suite", "x.yaml", "--task", "1"]) == 2
    assert "lcm, seed 0 needs teacher, seed 0, which is to do" in capsys.readouterr().err
    finish(plan().cells[0])
    run(["suite", "x.yaml", "--task", "0"])
    assert "done; nothing to do" in capsys.readouterr().out
    run(["suite", "x.yaml", "--task", "1"])
    assert called[0][:3] == ["fit", "-c", "runs/x/lcm/seed_0/local/config.yaml"]
    assert main(["suite", "x.yaml", "--task", "3"]) == 2
    assert main(["suite", "--task", "runs/x/lcm/seed_0"]) == 2
    assert "There is no 'runs/x/lcm/seed_0/slurm/config.yaml'" in capsys.readouterr().err


def test_two_suites_do_not_work_in_one_folder(
    here: Path, started: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with local.only_one(HOME):
        assert main(["suite", "x.yaml"]) == 2
    assert "Another `fewstep suite`" in capsys.readouterr().err
    assert not started


def test_the_output_of_a_process_is_in_its_log_and_its_status_is_noted(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(local, "command_of", lambda *rest: ["no-such-command"])
    assert main(["suite", "x.yaml", "--only", "alone"]) == 2
    assert "There is no command 'no-such-command'" in capsys.readouterr().err
    folder = HOME / "alone" / "seed_0" / "local"
    assert "fewstep no-such-command" in (folder / "fit.out").read_text()
    assert (folder / "exit").read_text() == "2\n"


# ---------------------------------------------------------------------- the summary


def test_the_summary_has_means_and_deviations_over_seeds(here: Path) -> None:
    write_suite(seeds=[0, 1, 2], experiments=["digits/teacher"])
    cells = plan().cells
    for cell, value in zip(cells, (1.0, 2.0, 3.0), strict=True):
        finish(cell, value)
    finish(cells[2], 3.0, steps=8)
    lines = summary({"teacher": [cell.folder for cell in cells]}).splitlines()
    assert "over up to 3 training seeds" in lines[0]
    assert lines[2] == "| run | 4 | 8 |"
    assert lines[4] == "| teacher | 1.500 ± 0.707 | 3.000 |"


@pytest.mark.slow
def test_the_summary_says_of_how_many_runs_a_number_is_and_which_diverged(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(cell: Cell) -> int:
        (cell.folder / "local" / "fit.out").write_text("error: not finite\n")
        return NOT_FINITE if cell.variant.label == "lost" or cell.seed == 1 else 0

    lost = {"experiment": "digits/teacher", "label": "lost"}
    write_suite(seeds=[0, 1, 2], experiments=["digits/teacher", lost])
    in_place_of_processes(monkeypatch, diverge)
    assert main(["suite", "x.yaml"]) == 2
    assert "teacher, seed 1 failed (diverged)" in capsys.readouterr().err
    text = (HOME / "summary.md").read_text()
    assert "| teacher (2 of 3 runs, 1 diverged) | 1.000 ± 0.000 |" in text
    assert "| lost (0 of 3 runs, 3 diverged) | – |" in text
    left_out = ["", "- `teacher`: diverged (seed 1)", "- `lost`: diverged (seed 0, 1, 2)"]
    assert text.partition("not in these numbers\n")[2].splitlines() == left_out
    assert plan().cells[1].standing.detail == "diverged", "it is known from the folder alone"


# ---------------------------------------------------------------------- for real


TINY = {
    "trainer.max_steps": 150,
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": 1000,
    "trainer.callbacks.Evaluation.num_samples": 256,
    "trainer.callbacks.Evaluation.roles": ["ema"],
    "trainer.callbacks.Checkpoints.every_n_updates": 10,
    "trainer.callbacks.Samples.count": 8,
    "data.init_args.reference_samples": 256,
}


def begin() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.main", "suite", "x.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=Path("suite.out").open("ab"),
        stderr=subprocess.STDOUT,
    )


def wait_for(what: str, ready: Callable[[], bool], suite: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not ready():
        assert suite.poll() is None, Path("suite.out").read_text()[-3000:]
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def saved(label: str) -> int:
    """The update of the newest checkpoint."""
    found = sorted((HOME / label / "seed_0" / "checkpoints").glob("update_*.ckpt"))
    return int(found[-1].stem.removeprefix("update_")) if found else 0


def starts(label: str) -> int:
    """How often a run was started."""
    return (HOME / label / "seed_0" / "local" / "fit.out").read_text().count("fewstep fit")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_suite_that_is_stopped_and_killed_goes_on_and_nothing_runs_twice(here: Path) -> None:
    write_suite(set=TINY, experiments=["analytic/lcm", "analytic/pcm"])
    suite = begin()
    wait_for("a checkpoint", lambda: saved("lcm") >= 10, suite)
    suite.send_signal(signal.SIGINT)
    assert suite.wait(120) == 130
    assert states(plan()) == {"lcm, seed 0": "partly", "pcm, seed 0": "to do"}
    stopped_at = saved("lcm")
    assert "saved update" in (HOME / "lcm/seed_0/local/fit.out").read_text()

    suite = begin()
    wait_for("another checkpoint", lambda: saved("lcm") > stopped_at, suite)
    suite.kill()
    suite.wait()
    orphan = int((HOME / ".lock").read_text())
    with pytest.raises(FewstepError, match=f"left behind .process {orphan}"), local.only_one(HOME):
        pass
    os.kill(orphan, signal.SIGKILL)
    time.sleep(1)

    suite = begin()
    assert suite.wait(600) == 0, Path("suite.out").read_text()[-3000:]
    assert set(states(plan()).values()) == {"done"}
    assert (starts("lcm"), starts("pcm")) == (3, 1)
    assert saved("lcm") == TINY["trainer.max_steps"]
    results = json.loads((HOME / "lcm/seed_0/results.json").read_text())
    assert {m["num_samples"] for m in results["measurements"]} == {256}
    page = HOME / "report.html"
    assert "lcm" in page.read_text()
    page.unlink()
    run(["suite", "x.yaml"])
    assert (starts("lcm"), starts("pcm")) == (3, 1)
    assert page.exists()

    # Numbers lost after training are measured again, without training.
    (HOME / "pcm/seed_0/results.json").unlink()
    assert begin().wait(300) == 0
    assert starts("pcm") == 1
    assert set(states(plan()).values()) == {"done"}
