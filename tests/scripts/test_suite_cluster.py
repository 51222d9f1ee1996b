"""``fewstep suite --submit``: which jobs wait for which, and what they run."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from fewstep.errors import FewstepError
from scripts.main import main, run
from scripts.suite.options import parse_arguments

from suites import HOME, finish, plan, states, train, write_suite

STUDENT = {"experiment": "digits/lcm", "after": "teacher"}
# Each job has the number of its call, from 1.
SBATCH = """\
#!/bin/bash
echo "$@" >> calls
wc -l < calls
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/nowhere")
    return tmp_path


@pytest.fixture
def cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with stand-ins for SLURM's commands."""
    (here / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": "#!/bin/bash\ncat queue 2>/dev/null"}.items():
        command = here / "bin" / name
        command.write_text(text)
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:/usr/bin:/bin")
    return here


def scripts_of(cluster: Path) -> list[str]:
    """The scripts that were submitted, in their order."""
    calls = (cluster / "calls").read_text().split("\n")[:-1]
    return [Path(call.removeprefix("--parsable ")).read_text() for call in calls]


def dependency(script: str) -> str | None:
    """What a job waits for."""
    found = re.search(r"^#SBATCH --dependency=(\S+)$", script, re.M)
    return found[1] if found else None


def tasks(script: str) -> list[str]:
    """The runs of an array, below the suite's folder."""
    return re.findall(rf"^  \d+\) run=.*/{HOME}/(\S+) ;;$", script, re.M)


# ---------------------------------------------------------------------- who waits for whom


def test_students_wait_for_the_teacher_of_their_seed_and_the_report_for_all(cluster: Path) -> None:
    other = {**STUDENT, "experiment": "digits/pcm_4"}
    write_suite(seeds=[0, 1], experiments=["digits/teacher", STUDENT, other])
    run(["suite", "x.yaml", "--submit"])
    teachers, first, second, report = scripts_of(cluster)
    assert tasks(teachers) == ["teacher/seed_0", "teacher/seed_1"]
    assert "#SBATCH --array=0-1\n" in teachers
    assert (tasks(first), dependency(first)) == (["lcm/seed_0", "pcm_4/seed_0"], "afterok:1_0")
    assert (tasks(second), dependency(second)) == (["lcm/seed_1", "pcm_4/seed_1"], "afterok:1_1")
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in first, "or it would wait forever"
    assert dependency(teachers) is None
    assert dependency(report) == "afterany:1:2:3"


def test_where_each_waits_for_one_of_its_own_an_array_waits_task_by_task(cluster: Path) -> None:
    write_suite(seeds=[0, 1, 2], experiments=["digits/teacher", STUDENT])
    run(["suite", "x.yaml", "--submit", "--at-once", "2"])
    teachers, students, _ = scripts_of(cluster)
    assert tasks(students) == [f"lcm/seed_{n}" for n in (0, 1, 2)]
    assert dependency(students) == "aftercorr:1"
    assert "#SBATCH --array=0-2%2\n" in teachers


def test_what_is_done_is_neither_submitted_nor_waited_for(cluster: Path) -> None:
    write_suite(seeds=[0, 1], experiments=["digits/teacher", STUDENT])
    teacher = plan().cells[0]
    finish(teacher)
    run(["suite", "x.yaml", "--submit"])
    free, waiting, _ = scripts_of(cluster)
    assert (tasks(free), dependency(free)) == (["teacher/seed_1", "lcm/seed_0"], None)
    assert (tasks(waiting), dependency(waiting)) == (["lcm/seed_1"], "afterok:1_0")


@pytest.mark.slow
def test_what_is_in_the_queue_is_not_submitted_again_but_waited_for(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(experiments=["digits/teacher"])
    run(["suite", "x.yaml", "--submit"])
    (cluster / "queue").write_text("1_0|RUNNING\n")
    write_suite(experiments=["digits/teacher", STUDENT])
    assert states(plan())["teacher, seed 0"] == "in the queue"
    capsys.readouterr()
    run(["suite", "x.yaml", "--submit"])
    assert "job 1_0 running" in capsys.readouterr().out
    student, report = scripts_of(cluster)[2:]
    assert (tasks(student), dependency(student)) == (["lcm/seed_0"], "afterok:1_0")
    assert dependency(report) == "afterany:1_0:3"
    (cluster / "queue").write_text("1_0|RUNNING\n3_0|PENDING\n")
    assert not plan().open


# ---------------------------------------------------------------------- what runs


def test_a_job_runs_the_configuration_as_it_was_when_submitted(cluster: Path) -> None:
    write_suite(set={"trainer.max_steps": 70}, experiments=["digits/teacher"])
    run(["suite", "x.yaml", "--submit", "--nodes", "2", "--gpus-per-node", "4", "--time", "90"])
    folder = HOME / "teacher" / "seed_0"
    config = yaml.safe_load((folder / "slurm" / "config.yaml").read_text())
    trainer = config["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["max_steps"]) == (2, 4, 70)
    assert json.loads((folder / "slurm" / "job.json").read_text())["job"] == "1_0"
    script, report = scripts_of(cluster)
    assert '-m scripts.main suite --task "$run" &' in script
    assert "scontrol requeue" in script, "the job script of `fewstep submit`"
    assert "#SBATCH --ntasks-per-node=4\n" in script
    assert '-m scripts.main suite x.yaml --runs "$run" --report-only &' in report
    assert "#SBATCH --time=00:30:00\n" in report
    for absent in ("gpus-per-node", "--array", "nodes=2"):
        assert absent not in report


def test_a_run_gets_cores_for_its_loading_processes_and_the_report_none_to_spare(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = {"data.init_args.num_workers": 6}
    write_suite(experiments=[{"experiment": "digits/teacher", "set": workers}])
    run(["suite", "x.yaml", "--submit", "--dry-run"])
    training, report = capsys.readouterr().out.split("\n# -----")[1:]
    assert "#SBATCH --cpus-per-task=8\n" in training
    assert "--cpus-per-task" not in report


def test_a_submitted_run_is_trained_and_one_that_is_trained_is_measured(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("scripts.suite.command.run_command", called.append)
    write_suite(experiments=["digits/teacher"])
    run(["suite", "x.yaml", "--submit"])
    folder = str(HOME / "teacher" / "seed_0")
    run(["suite", "--task", folder])
    train(plan().cells[0])
    run(["suite", "--task", folder])
    config = ["-c", f"{folder}/slurm/config.yaml", "--run.version", "seed_0"]
    assert called == [["fit", *config, "--ckpt_path", "last"], ["evaluate", *config]]


def test_a_dry_run_prints_whole_scripts_and_touches_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(experiments=["digits/teacher", STUDENT])
    run(["suite", "x.yaml", "--submit", "--dry-run", "--partition", "gpu"])
    _, *scripts = capsys.readouterr().out.split("\n# -----")
    assert len(scripts) == 3
    assert [dependency(script) for script in scripts] == [
        None,
        "afterok:JOB0_0",
        "afterany:JOB0:JOB1",
    ]
    for script in scripts:
        assert "#SBATCH --partition=gpu\n" in script
        text = script[script.index("#!/bin/bash") :]
        assert "{{" not in text
        assert (
            subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0
        )
    assert not Path("runs").exists()


# ---------------------------------------------------------------------- mistakes


def test_without_slurm_a_suite_is_not_submitted(here: Path) -> None:
    write_suite(experiments=["digits/teacher"])
    with pytest.raises(FewstepError, match="`sbatch` was not found"):
        run(["suite", "x.yaml", "--submit"])
    assert not Path("runs").exists()


def test_the_number_of_devices_is_said_once(cluster: Path) -> None:
    write_suite(set={"trainer.devices": 4}, experiments=["digits/teacher"])
    with pytest.raises(FewstepError, match=r"'teacher' sets trainer\.devices\. Leave it out"):
        run(["suite", "x.yaml", "--submit"])
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--time", "4"], "--time is for a cluster: add --submit"),
        (["x", "--gpus-per-node", "2"], "--gpus-per-node is for a cluster"),
        (["x", "--at-once", "2"], "--at-once is for a cluster"),
        (["x", "--sedes", "2"], "nrecognized arguments: --sedes"),
        ([], "Which suite?"),
        (["--task", "3"], "Which suite?"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(FewstepError, match=re.escape(message)):
        parse_arguments(arguments)
    assert main(["suite", *arguments]) == 2
