"""Submits a suite to SLURM: arrays that wait for what they need, and a job for the report."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fewstep.errors import FewstepError
from scripts.slurm.cores import with_cores
from scripts.slurm.options import Options
from scripts.slurm.script import batch_script, fewstep_command
from scripts.slurm.submit import record_job, sbatch
from scripts.suite.plan import Cell, Plan
from scripts.suite.states import CLUSTER, State, job_of

REPORT_TIME = "00:30:00"
SIZE_KEYS = ("trainer.num_nodes", "trainer.devices")


def submit(plan: Plan, options: Options, at_once: int | None) -> None:
    """Writes and submits all open runs, and the report behind them; prints how to follow.

    Raises:
        FewstepError: if SLURM is missing or refuses, or a run says itself how many devices it has.
    """
    if not options.dry_run and shutil.which("sbatch") is None:
        raise FewstepError(
            "There is no SLURM here: `sbatch` was not found. --dry-run shows the scripts here; "
            "without --submit the suite runs on this machine."
        )
    refuse_sizes(plan)
    # The task, such as 17_2, of every run that is in the queue or is about to be.
    jobs = {c: j for c in plan.in_state(State.QUEUED) if (j := job_of(c.folder)) is not None}
    awaited = list(jobs.values())
    for level in levels(plan.open):
        for cells, dependency in divide(level, jobs):
            script = array_script(plan, cells, dependency, options, at_once)
            job = submit_array(cells, script, options, number=len(awaited))
            jobs |= {cell: f"{job}_{task}" for task, cell in enumerate(cells)}
            awaited.append(job)
    submit_report(plan, awaited, options)


def refuse_sizes(plan: Plan) -> None:
    """The number of devices is said once.

    Raises:
        FewstepError: naming the entry that says it too.
    """
    for cell in plan.open:
        for key in SIZE_KEYS:
            if key in cell.asked.chosen:
                raise FewstepError(
                    f"Entry '{cell.variant.label}' sets {key}. Leave it out to submit: --nodes and "
                    "--gpus-per-node say it to SLURM and to the runs."
                )


# ---------------------------------------------------------------------- who waits for whom


def levels(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Runs by how many open ones stand before them, one behind the other."""
    depth: dict[Cell, int] = {}
    for cell in cells:
        depth[cell] = max((depth[p] + 1 for p in cell.parents if p in depth), default=0)
    deepest = max(depth.values(), default=-1)
    return [[cell for cell in cells if depth[cell] == level] for level in range(deepest + 1)]


def divide(level: Sequence[Cell], jobs: Mapping[Cell, str]) -> list[tuple[list[Cell], str | None]]:
    """The arrays of a level, each with what sbatch is told to wait for.

    Runs that need the same ones are an array. Where each needs one of its own, and those are the
    tasks of an array in the same order, all are one array that waits task by task.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in level:
        needed = dict.fromkeys(jobs[parent] for parent in cell.parents if parent in jobs)
        groups.setdefault(tuple(needed), []).append(cell)
    if 1 < len(groups) == len(level):
        first = next(iter(groups))
        job = first[0].partition("_")[0] if first else ""
        if list(groups) == [(f"{job}_{task}",) for task in range(len(level))]:
            return [(list(level), f"aftercorr:{job}")]
    return [
        (cells, f"afterok:{':'.join(needed)}" if needed else None)
        for needed, cells in groups.items()
    ]


# ---------------------------------------------------------------------- scripts


def array_script(
    plan: Plan, cells: Sequence[Cell], dependency: str | None, options: Options, at_once: int | None
) -> str:
    """The batch script of an array: the one of ``fewstep submit``, with a task for each run."""
    more = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    tasks = str(len(cells)) + (f"%{at_once}" if at_once else "")
    sized = with_cores(options, [cell.asked.config.get("data") for cell in cells])
    asked = replace(sized, sbatch=[*options.sbatch, *more], array=tasks)
    command = [fewstep_command(options), "suite", '--task "$run"']
    folders = [cell.folder.absolute() for cell in cells]
    return batch_script(asked, plan.suite.name, folders, None, command, plan.home)


def submit_array(cells: Sequence[Cell], script: str, options: Options, number: int) -> str:
    """Writes the runs' folders and submits; returns the job's id, a made-up one in a dry run."""
    if options.dry_run:
        print(f"\n# {'-' * 60} JOB{number}\n{script}", end="")
        return f"JOB{number}"
    for cell in cells:
        cell.prepare(CLUSTER, **machine(options))
        (cell.folder / CLUSTER / "job.sh").write_text(script)
    job = sbatch(cells[0].folder / CLUSTER / "job.sh")
    for task, cell in enumerate(cells):
        record_job(cell.folder, f"{job}_{task}", cell.asked.max_steps)
    print(f"Job {job}: {'; '.join(cell.name for cell in cells)}")
    return job


def machine(options: Options) -> dict[str, Any]:
    """The trainer's options that say on what it runs."""
    found: dict[str, Any] = {"num_nodes": options.nodes, "devices": options.tasks_per_node}
    return found if options.gpus_per_node else {**found, "accelerator": "cpu"}


def submit_report(plan: Plan, awaited: Sequence[str], options: Options) -> None:
    """Submits the job that writes the report once all others have ended, however they did."""
    more = [f"--dependency=afterany:{':'.join(awaited)}"] if awaited else []
    small = replace(
        options,
        nodes=1,
        gpus_per_node=0,
        cpus_per_gpu=None,
        mem=None,
        time=REPORT_TIME if options.time else None,
        sbatch=[*options.sbatch, *more],
        array=None,
    )
    suite = [shlex.quote(str(plan.suite.path)), "--runs", '"$run"', "--report-only"]
    command = [fewstep_command(options), "suite", *suite]
    home = plan.home.absolute()
    script = batch_script(small, f"{plan.suite.name}-report", [home], None, command, home)
    if options.dry_run:
        print(f"\n# {'-' * 60} the report\n{script}", end="")
        return
    path = home / CLUSTER / "job.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    print(f"Job {sbatch(path)}: the report, {plan.home / 'report.html'}")
    print(f"Look: fewstep suite {plan.suite.path} --runs {plan.home} --dry-run")
    print(f"      fewstep submit --status {plan.home}")
