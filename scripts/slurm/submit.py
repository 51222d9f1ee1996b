"""Checks an experiment, makes its run folder, and hands it to sbatch."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import FewstepError
from scripts.cli import FewstepCLI
from scripts.runs import place_new_run
from scripts.slurm.cores import with_cores
from scripts.slurm.missing import missing
from scripts.slurm.options import Options
from scripts.slurm.queue import queued
from scripts.slurm.script import batch_script


class CheckedExperiment(FewstepCLI):
    """Parses what ``fewstep fit`` would, places the run and goes no further."""

    def instantiate_classes(self) -> None:
        """Nothing is built on the login node."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run on the login node."""

    def plain(self) -> dict[str, Any]:
        """The whole experiment in plain values, all defaults included."""
        text = self._parser("fit").dump(self.config.fit, skip_unset=False)
        return dict(yaml.safe_load(text))


@dataclass(frozen=True)
class Task:
    """One run to train.

    Attributes:
        experiment: what was parsed, every key of it checked.
        run: its folder, absolute.
        new: whether the folder is yet to be made.
    """

    experiment: CheckedExperiment
    run: Path
    new: bool

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.experiment.config.fit.run.name)

    @property
    def first_checkpoint(self) -> Path | None:
        """The checkpoint to start from that is not simply the run's newest."""
        given = self.experiment.config.fit.ckpt_path
        found = self.experiment.checkpoint
        return None if given in (None, "last") or found is None else found.resolve()


def submit(options: Options, fit_arguments: list[str]) -> None:
    """Checks, writes and submits; prints how to follow.

    Raises:
        FewstepError: for a mistake in the experiment, the options or the template, a run that is
            still being trained, or if SLURM is missing or refuses.
    """
    tasks = checked_tasks(options, fit_arguments)
    asked = with_cores(options, [task.experiment.config.fit.get("data") for task in tasks])
    first, folders = tasks[0], [task.run for task in tasks]
    home = Path(first.experiment.config.fit.run.dir)
    script = batch_script(asked, first.name, folders, first.first_checkpoint, home=home)
    tell_missing(tasks)
    if options.dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise FewstepError(
            "There is no SLURM here: `sbatch` was not found. Submit from a login node of your "
            "cluster; --dry-run shows the script here."
        )
    refuse_running(tasks)
    for task in tasks:
        write_task(task, script)
    try:
        job = sbatch(tasks[0].run / "slurm" / "job.sh")
    except FewstepError:
        for task in tasks:
            if task.new:
                shutil.rmtree(task.run)
        raise
    for number, task in enumerate(tasks):
        max_steps = task.experiment.config.fit.trainer.max_steps
        record_job(task.run, f"{job}_{number}" if options.array else job, max_steps)
    tell(job, tasks)


# ---------------------------------------------------------------------- checking


def tell_missing(tasks: Sequence[Task]) -> None:
    """Says what the jobs will look for and is not there yet: another job may still make it."""
    found = missing(tasks[0].experiment.plain())  # those of an array differ by options alone
    if found:
        print("Not here yet; a job ends at its start without it:", file=sys.stderr)
        print("".join(f"  {line}\n" for line in found), end="", file=sys.stderr)


def checked_tasks(options: Options, fit_arguments: list[str]) -> list[Task]:
    """Parses every task's experiment and decides on its folder; touches nothing.

    Raises:
        FewstepError: naming what is wrong, and in which line of an array's file.
    """
    size = [f"--trainer.num_nodes={options.nodes}", f"--trainer.devices={options.tasks_per_node}"]
    if options.gpus_per_node == 0:
        size.append("--trainer.accelerator=cpu")
    size += [f"--ckpt_path={options.ckpt_path}"] if options.ckpt_path else []
    size += [f"--run.version={options.version}"] if options.version else []
    arguments = ["fit", *fit_arguments, *size]
    first = CheckedExperiment(arguments)
    if options.array is None:
        run = first.run_dir.absolute()
        return [Task(first, run, new=not run.exists())]
    if options.version or first.config.fit.ckpt_path == "last":
        raise FewstepError(
            "An array starts new runs: leave out --run.version and --ckpt_path last, or go on "
            "with one run at a time."
        )
    tasks: list[Task] = []
    for where, more in array_tasks(options.array, first):
        try:
            experiment = CheckedExperiment([*arguments, *more])
        except FewstepError as error:
            raise FewstepError(f"{where}: {error}") from error
        tasks.append(Task(experiment, new_run(experiment, [t.run for t in tasks]), new=True))
    return tasks


def array_tasks(array: str, first: CheckedExperiment) -> list[tuple[str, list[str]]]:
    """For each task of ``N``, ``FILE``, ``N%K`` or ``FILE%K``: where it is from, and its options.

    Raises:
        FewstepError: if it is neither a number nor a file with lines.
    """
    source = array.rpartition("%")[0] or array
    at_once = array.rpartition("%")[2] if "%" in array else "1"
    if not at_once.isdigit() or at_once == "0":
        raise FewstepError(f"--array {array}: after % goes how many tasks may run at a time.")
    if source.isdigit():
        seed = int(first.config.fit.seed_everything)
        found = [(f"Task {n}", [f"--seed_everything={seed + n}"]) for n in range(int(source))]
    elif Path(source).is_file():
        lines = enumerate(Path(source).read_text().splitlines(), start=1)
        split = [(f"Line {n} of '{source}'", shlex.split(line, comments=True)) for n, line in lines]
        found = [(where, words) for where, words in split if words]
    else:
        raise FewstepError(
            f"--array {array} is neither a number of seeds nor a file with a line of options for "
            "each task."
        )
    if not found:
        raise FewstepError(f"--array {array} has no tasks.")
    return found


def new_run(experiment: CheckedExperiment, taken: list[Path]) -> Path:
    """The next free run folder, past those that other tasks are about to make."""
    folder = place_new_run(experiment.run_dir.parent).absolute()
    number = int(folder.name.removeprefix("version_"))
    while folder in taken:
        number += 1
        folder = folder.with_name(f"version_{number}")
    return folder


def refuse_running(tasks: list[Task]) -> None:
    """Two jobs must not train in one folder.

    Raises:
        FewstepError: if a run's job is still in the queue.
    """
    states = queued()
    for task in tasks:
        record = task.run / "slurm" / "job.json"
        if not record.is_file():
            continue
        job = json.loads(record.read_text())["job"]
        if job in states:
            raise FewstepError(
                f"Job {job} ({states[job].lower()}) still works on '{task.run}'. Wait for it, "
                f"`scancel {job}` it first, or leave out --ckpt_path for a new run."
            )


# ---------------------------------------------------------------------- submitting


def write_task(task: Task, script: str) -> None:
    """Makes the folder with its script and the experiment as it is now.

    The job reads this copy, so that editing the experiment's file meanwhile, or between two starts,
    changes nothing.
    """
    folder = task.run / "slurm"
    task.run.mkdir(parents=True, exist_ok=not task.new)
    folder.mkdir(exist_ok=True)
    (folder / "job.sh").write_text(script)
    task.experiment._parser("fit").save(
        task.experiment.config.fit,
        folder / "config.yaml",
        skip_none=False,
        overwrite=True,
        multifile=False,
    )


def sbatch(script: Path) -> str:
    """Submits a script; returns the job's id.

    Raises:
        FewstepError: with SLURM's own words if it refuses.
    """
    # What an interactive job has set for itself must not leak into this one.
    kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith("SLURM_")}
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=kept, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("sbatch: error: ")
        raise FewstepError(
            f"SLURM refuses the job: {said}. --dry-run shows the script; --cpus-per-gpu and --mem "
            "ask for less."
        )
    return done.stdout.strip().split(";")[0]


def record_job(run: Path, job: str, max_steps: int) -> None:
    """Notes which job trains a run, for ``--status``."""
    record = {
        "job": job,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_steps": max_steps,
    }
    (run / "slurm" / "job.json").write_text(json.dumps(record, indent=1))


def tell(job: str, tasks: list[Task]) -> None:
    """Prints the job, its folders and how to follow."""
    print(f"Job {job}: {tasks[0].name}" + (f", {len(tasks)} tasks" if len(tasks) > 1 else ""))
    shown = [Path(os.path.relpath(task.run)) for task in tasks]
    for run in shown:
        print(f"Folder: {run}")
    print(f"Follow: tail -F {shown[0]}/slurm/*-0.out   (once it runs)")
    print(f"Look:   fewstep submit --status {Path(os.path.relpath(tasks[0].run.parent))}")
    print(f"Stop:   scancel {job}   (to save first and come back: scancel -b -s USR1 {job})")
