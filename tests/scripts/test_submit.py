"""``fewstep submit`` without a SLURM: what it checks, writes, hands over and reports."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from jsonargparse import dict_to_namespace

from fewstep.errors import FewstepError
from scripts.main import main, run
from scripts.slurm.cores import loading_processes
from scripts.slurm.options import Options
from scripts.slurm.script import SKELETON, batch_script, fill
from scripts.slurm.status import newest_update
from scripts.slurm.submit import CheckedExperiment
from scripts.this_fewstep import this_fewstep

COMMANDS = {
    # Notes what it was given, and gives the job a number.
    "sbatch": 'echo "$@" >> calls; env | grep ^SLURM_ >> leaked; echo 17',
    "squeue": "cat queue 2>/dev/null",
    "sacct": "cat accounts 2>/dev/null",
    "scontrol": 'echo "$@" >> scontrol_calls',
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/nowhere")
    return tmp_path


@pytest.fixture
def cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with stand-ins for SLURM's commands."""
    for name, text in COMMANDS.items():
        command = here / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:/usr/bin:/bin")
    return here


def dry_run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    run(["submit", "-c", "digits/teacher", "--dry-run", *options])
    return capsys.readouterr().out


def submit(*options: str) -> None:
    run(["submit", "-c", "digits/teacher", *options])


def config_of(run_folder: Path) -> dict[str, object]:
    loaded = yaml.safe_load((run_folder / "slurm" / "config.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


RUNS = Path("runs/digits/teacher")


# ---------------------------------------------------------------------- the script


def test_a_dry_run_shows_the_script_and_touches_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = dry_run(
        capsys,
        *("--nodes", "2", "--gpus-per-node", "8", "--cpus-per-gpu", "6", "--time", "24:00:00"),
        *("--partition", "gpu", "--constraint", "h100|h200", "--sbatch=--exclusive"),
        *("--signal-before", "300", "--setup", "module load cuda", "--setup", "ulimit -n 4096"),
    )
    lines = script.splitlines()
    for expected in (
        "--job-name=digits/teacher",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--time=24:00:00",
        "--partition=gpu",
        "--constraint='h100|h200'",
        f"--chdir={here}",
        f"--output={here / RUNS}/version_0/slurm/%j.out",
        "--signal=B:USR1@300",
        "--open-mode=append",
        "--requeue",
        "--exclusive",
    ):
        assert f"#SBATCH {expected}" in lines, expected
    assert lines.index("module load cuda") < lines.index("ulimit -n 4096")
    assert "--cpus-per-task=6" in script[script.index("srun") :], "srun does not inherit it"
    assert "{{" not in script
    assert "300 s before" in script
    assert list(here.iterdir()) == []
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_is_not_asked_for_is_left_to_the_cluster(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = dry_run(capsys, "--gpus-per-node", "0")
    assert "#SBATCH --ntasks-per-node=1\n" in script
    for absent in ("gpus", "--mem", "--time", "--partition", "--account", "--qos", "--array"):
        assert absent not in script


@pytest.mark.parametrize(
    ("options", "cores"),
    [
        ([], 2),
        (["--data.init_args.num_workers", "8"], 10),
        (["--data.init_args.num_workers", "8", "--gpus-per-node", "0"], 10),
        (["--data.init_args.num_workers", "8", "--cpus-per-gpu", "4"], 4),
    ],
)
def test_a_rank_gets_cores_for_its_loading_processes_and_two_more(
    options: list[str], cores: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = dry_run(capsys, *options)
    assert f"#SBATCH --cpus-per-task={cores}\n" in script
    assert f" --cpus-per-task={cores} " in script[script.index("srun") :], "srun inherits none"


def test_an_array_gets_cores_for_its_most_demanding_task(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"--data.init_args.num_workers {number}" for number in (1, 5, 3)]
    Path("loads.txt").write_text("\n".join(lines))
    assert "#SBATCH --cpus-per-task=7\n" in dry_run(capsys, "--array", "loads.txt")


def test_data_within_data_load_too() -> None:
    inner = dict_to_namespace({"class_path": "Pictures", "init_args": {"num_workers": 4}})
    data = {"class_path": "Mixed", "init_args": {"num_workers": 8, "parts": [inner], "x": None}}
    assert loading_processes(data) == 12
    assert loading_processes({"class_path": "Rings", "init_args": {"num_modes": 5}}) == 0
    assert loading_processes(None) == 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("image.sif", "apptainer exec --nv --bind"),
        ("nvcr.io#nvidia/pytorch:26.01", "--container-image='nvcr.io#nvidia/pytorch:26.01'"),
    ],
)
def test_in_a_container_the_installed_command_runs(
    image: str, expected: str, tmp_path: Path
) -> None:
    script = batch_script(Options(container=image), "x", [tmp_path])
    assert expected in script
    assert "  fewstep fit -c" in script


@pytest.mark.parametrize(
    ("image", "option"), [("image.sif", "--bind "), ("nvcr.io#x", "--container-mounts=")]
)
def test_a_container_sees_the_runs_and_what_it_is_told_to(
    image: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    options = Options(container=image, mount=["/scratch/models", "data:/data"])
    here, told = f"{work}:{work}", f"/scratch/models:/scratch/models,{work}/data:/data"
    away = tmp_path / "away"
    for home, seen in ((work / "runs", ""), (away, f",{away}:{away}")):
        script = batch_script(options, "x", [home / "x" / "version_0"], home=home)
        assert f"{option}{here}{seen},{told} " in script
    away.mkdir()
    (work / "linked").symlink_to(away)
    script = batch_script(options, "x", [work / "linked" / "x"], home=work / "linked")
    assert f"{option}{here},{away}:{away},{told} " in script


def test_a_users_packages_of_our_names_do_not_stand_in_a_jobs_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("scripts", "callbacks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    plan = [*this_fewstep(), "plan", "-c", "digits/teacher"]
    found = subprocess.run(plan, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_what_a_job_will_look_for_and_is_not_here_is_listed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    metrics = [{"class_path": "fewstep.metrics.FID"}]
    evaluation = {"class_path": "callbacks.Evaluation", "init_args": {"metrics": metrics}}
    sample = {"class_path": "datamodules.fields.Images", "init_args": {"size": 8}}
    shards = {"shards": ["data/train-{0..1}.tar", "https://x.y/z.tar"], "val_shards": "data/*.tar"}
    content = {
        "trainer": {"callbacks": [evaluation], "max_steps": 5},
        "data": {
            "class_path": "datamodules.Shards",
            "init_args": {**shards, "batch_size": 4, "sample": sample},
        },
        "model": {
            "class_path": "lightning_modules.ConsistencyDistillation",
            "init_args": {"teacher": "runs/analytic/teacher", "num_grid_points": 20},
        },
    }
    Path("mine.yaml").write_text(yaml.safe_dump(content))

    def told() -> list[str]:
        run(["submit", "-c", "mine.yaml", "--dry-run"])
        return [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]

    places = [line.split(":")[0] for line in told()]
    keys = ["model.init_args.teacher", "data.init_args.shards", "data.init_args.val_shards", "FID"]
    assert places == keys
    Path("data").mkdir()
    for number in range(2):
        Path(f"data/train-{number}.tar").touch()
    checkpoint = Path("runs/analytic/teacher/version_0/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert [line.split(":")[0] for line in told()] == ["FID"]


def stand_in(here: Path, training: str, **environment: str) -> subprocess.Popen[str]:
    """Runs the default script with something else in place of srun and the training."""
    folder = here / "my run" / "version_0"
    (folder / "slurm").mkdir(parents=True)
    (folder / "PREEMPT").touch()
    text = batch_script(Options(), "x", [folder])
    launch = text.index("srun --open-mode")
    script = text[:launch] + f"bash -c {training!r} &" + text[text.index("\ntraining=$!") :]
    (folder / "slurm" / "job.sh").write_text(script)
    return subprocess.Popen(
        ["/bin/bash", str(folder / "slurm" / "job.sh")],
        env={**os.environ, "SLURM_JOB_ID": "17", **environment},
        text=True,
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_only_status_75_goes_back_into_the_queue(status: int, cluster: Path) -> None:
    assert stand_in(cluster, f"exit {status}").wait(10) == status
    assert (cluster / "scontrol_calls").exists() == (status == 75)
    assert (cluster / "my run/version_0/slurm/exit").read_text() == f"{status}\n"
    assert not (cluster / "my run/version_0/PREEMPT").exists(), "the flag of an earlier start"


def test_a_signal_raises_the_flag_and_the_script_waits_on(cluster: Path) -> None:
    flag = cluster / "my run/version_0/PREEMPT"
    job = stand_in(
        cluster, f'touch ready; until [ -e "{flag}" ]; do sleep 0.05; done; sleep 0.5; exit 75'
    )
    while not (cluster / "ready").exists():
        assert job.poll() is None
        time.sleep(0.01)
    for _ in range(3):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    assert job.wait(10) == 75
    assert (cluster / "scontrol_calls").read_text() == "requeue 17\n"


def test_a_given_checkpoint_counts_until_this_job_has_saved_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (here / "slurm").mkdir()
    (here / "checkpoints").mkdir()
    text = batch_script(Options(), "x", [here], first_checkpoint=Path("/a b/first.ckpt"))
    begin = text.index("checkpoint=")
    choice = text[begin : text.index("\n\n", begin)]
    (here / "slurm" / "job.sh").touch()

    def chosen() -> str:
        script = f'run="{here}"\n{choice}\necho "$checkpoint"'
        done = subprocess.run(["/bin/bash", "-c", script], stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().strip()

    saved = here / "checkpoints" / "update_00000004.ckpt"
    saved.touch()
    os.utime(saved, (1, 1))
    (here / "checkpoints" / "last.ckpt").symlink_to(saved.name)
    assert chosen() == "/a b/first.ckpt"
    later = (here / "slurm" / "job.sh").stat().st_mtime + 5
    os.utime(saved, (later, later))
    assert chosen() == "last"


# ---------------------------------------------------------------------- templates


def test_a_template_of_ones_own_is_filled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.sh").write_text("#!/bin/zsh\n{{directives}}\n{{ run }}\n${HOME} {{command}}\n")
    script = dry_run(capsys, "--template", "mine.sh", "--nodes", "3")
    assert script.startswith("#!/bin/zsh\n#SBATCH --job-name=digits/teacher\n#SBATCH --nodes=3\n")
    assert "${HOME} " in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{directives}} {{run}} {{comand}}", "unknown placeholder {{comand}}. Did you mean 'co"),
        ("{{directives}} {{run}} {{comand}}", "Known: {{directives}}, {{run}}, {{signal_before}}"),
        ("{{directives}} {{run}}", "lacks {{command}}"),
    ],
)
def test_a_template_with_a_wrong_placeholder_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.sh").write_text(text)
    with pytest.raises(FewstepError) as refused:
        batch_script(Options(template=tmp_path / "mine.sh"), "x", [tmp_path])
    assert message in str(refused.value)


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"none\.sh' cannot be read"):
        fill(tmp_path / "none.sh", {})
    assert SKELETON.is_file()


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.lr_decai", "cosine"], "lr_decai"),
        (["--ndoes", "2"], "no option '--ndoes'. Did you mean 'nodes'?"),
        (["--nodes", "0"], "Argument --nodes: '0' is no whole number from 1 on"),
        (["--trainer.devices", "4"], "Leave out --trainer.devices: --nodes and --gpus-per-node"),
        (["--ckpt_path", "nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        (["--array", "many"], "neither a number of seeds nor a file"),
        (["--array", "4%x"], "after % goes how many"),
        (["--array", "0"], "has no tasks"),
        (["--array", "2", "--ckpt_path", "last"], "An array starts new runs"),
        ([], "`sbatch` was not found. Submit from a login node"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    options: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "-c", "digits/teacher", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


# ---------------------------------------------------------------------- submitting


def test_a_submitted_run_has_its_folder_script_and_a_copy_of_the_experiment(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as inside an interactive job
    monkeypatch.setenv("SLURM_CONF", "kept")
    submit("--nodes", "2", "--gpus-per-node", "4", "--trainer.max_steps", "700")
    folder = cluster / RUNS / "version_0"
    assert (cluster / "calls").read_text() == f"--parsable {folder}/slurm/job.sh\n"
    assert (cluster / "leaked").read_text() == "SLURM_CONF=kept\n"
    trainer = config_of(folder)["trainer"]
    assert isinstance(trainer, dict)
    sizes = [int(trainer[name]) for name in ("num_nodes", "devices", "max_steps")]
    assert sizes == [2, 4, 700]
    printed = capsys.readouterr().out
    assert "Job 17: digits/teacher" in printed
    assert "Folder: runs/digits/teacher/version_0" in printed
    # What the script runs is complete: it parses to the same run, in the same folder.
    frozen = str(folder / "slurm" / "config.yaml")
    again = CheckedExperiment(
        ["fit", "-c", frozen, "--run.version", "version_0", "--ckpt_path", "last"]
    )
    assert (again.run_dir, again.checkpoint) == (RUNS / "version_0", None)
    assert again.config.fit.trainer.max_steps == 700
    submit("--ckpt_path", "last")
    assert [path.name for path in (cluster / RUNS).iterdir()] == ["version_0"]


def test_a_run_with_a_checkpoint_is_continued_in_its_folder(cluster: Path) -> None:
    saved = cluster / RUNS / "version_3" / "checkpoints" / "last.ckpt"
    saved.parent.mkdir(parents=True)
    saved.touch()
    submit("--ckpt_path", "last")
    script = (cluster / RUNS / "version_3" / "slurm" / "job.sh").read_text()
    assert "\ncheckpoint=last\n" in script
    submit("--ckpt_path", str(saved.relative_to(cluster)))
    script = (cluster / RUNS / "version_3" / "slurm" / "job.sh").read_text()
    assert f"\ncheckpoint={saved}\n" in script
    (cluster / "queue").write_text("17|RUNNING\n")
    with pytest.raises(FewstepError, match=r"Job 17 \(running\) still works on"):
        submit("--ckpt_path", "last")


def test_if_slurm_refuses_nothing_stays_behind(cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gup' >&2; exit 1\n"
    )
    with pytest.raises(FewstepError, match="SLURM refuses the job: invalid partition"):
        submit("--partition", "gup", "--array", "2")
    assert not list((cluster / RUNS).glob("version_*"))


@pytest.mark.slow
def test_an_array_of_seeds_has_a_run_for_each(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / RUNS / "version_4").mkdir(parents=True)
    submit("--array", "3%2", "--seed_everything", "10")
    folders = [cluster / RUNS / f"version_{n}" for n in (5, 6, 7)]
    assert [config_of(folder)["seed_everything"] for folder in folders] == [10, 11, 12]
    jobs = [json.loads((f / "slurm" / "job.json").read_text())["job"] for f in folders]
    assert jobs == ["17_0", "17_1", "17_2"]
    script = (folders[0] / "slurm" / "job.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    assert f"  1) run={folders[1]} ;;\n" in script
    assert "Job 17: digits/teacher, 3 tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_an_array_of_a_file_has_a_run_for_each_line(cluster: Path) -> None:
    (cluster / "sweep.txt").write_text(
        "--model.init_args.ema_decay 0.9  # short\n\n"
        "--model.init_args.ema_decay 0.99 --run.name 'long one'\n"
    )
    submit("--array", "sweep.txt")
    short, long = cluster / RUNS / "version_0", cluster / "runs/long one/version_0"
    decays = [config_of(f)["model"]["init_args"]["ema_decay"] for f in (short, long)]  # type: ignore[index]
    assert decays == [0.9, 0.99]
    assert f"run='{long}' ;;" in (short / "slurm" / "job.sh").read_text()
    (cluster / "sweep.txt").write_text("--trainer.max_steps 5\n--trainer.max_stps 6\n")
    with pytest.raises(FewstepError, match=r"Line 2 of 'sweep\.txt': .*max_stps"):
        submit("--array", "sweep.txt")


# ---------------------------------------------------------------------- status


def test_the_status_tells_states_progress_and_why_a_job_failed(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("--array", "4", "--trainer.max_steps", "700")
    runs = [cluster / RUNS / f"version_{n}" for n in range(4)]
    (cluster / "queue").write_text("17_0|RUNNING\n99|PENDING\n")
    (cluster / "accounts").write_text("17_1|CANCELLED by 1000\n17_2|COMPLETED\n")
    (runs[0] / "metrics.csv").write_text("step,time,name,value\n49,1.0,a,2.0\n99,1.0,a,2.0\n14")
    (runs[0] / "checkpoints").mkdir()
    (runs[0] / "checkpoints" / "update_00000080.ckpt").touch()
    (runs[0] / "checkpoints" / "last.ckpt").symlink_to("update_00000080.ckpt")
    (runs[1] / "slurm" / "20-0.out").write_text("all is calm\n")
    (runs[3] / "slurm" / "exit").write_text("1\n")
    (runs[3] / "slurm" / "22-1.out").write_text("x\n" * 50 + "\nerror: no more digits\n")
    time.sleep(0.02)
    (runs[3] / "slurm" / "22-0.out").write_text("waited for the other rank\n")
    capsys.readouterr()
    run(["submit", "--status"])
    table, *ends = capsys.readouterr().out.split("\n\n")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["run", "job", "state", "update", "checkpoint"]
    states = {row[0]: row[1:] for row in rows[1:]}
    assert states["digits/teacher/version_0"][:2] == ["17_0", "RUNNING"]
    assert states["digits/teacher/version_0"][2:] == ["99", "/", "700", "update_00000080.ckpt"]
    assert states["digits/teacher/version_1"][1] == "CANCELLED"
    assert states["digits/teacher/version_2"][1:5] == ["COMPLETED", "0", "/", "700"]
    assert states["digits/teacher/version_3"][1:3] == ["FAILED", "(1)"]
    assert [end.split(" ends with:")[0].rpartition("/")[2] for end in ends] == [
        "version_1",
        "version_3",
    ]
    assert "error: no more digits" in ends[1], "the rank that failed, not the newest log"
    assert len(ends[1].splitlines()) == 7


def test_the_status_of_a_folder_without_jobs_says_so(here: Path) -> None:
    Path("runs").mkdir()
    with pytest.raises(FewstepError, match="No run below 'runs' was submitted"):
        run(["submit", "--status"])


def test_the_newest_update_of_no_metrics_is_none(tmp_path: Path) -> None:
    assert newest_update(tmp_path) == 0
