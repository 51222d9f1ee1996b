"""What ``fewstep suite`` does, in the order in which a user sees it."""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.errors import FewstepError
from scripts.cli import run_command
from scripts.slurm.options import Options as ClusterOptions
from scripts.suite.files import find_suite, read_suite
from scripts.suite.local import command_of, failures, run_plan
from scripts.suite.options import Options
from scripts.suite.plan import Cell, Plan, make_plan, print_plan, refuse_changed
from scripts.suite.states import CLUSTER, LOCAL, State
from scripts.suite.summary import report


def plan_of(options: Options) -> Plan:
    """The plan of a suite, all of it checked.

    Raises:
        FewstepError: for what is wrong in the suite.
    """
    suite = read_suite(find_suite(str(options.suite)), options.seeds)
    home = options.runs or Path("runs") / suite.name
    return make_plan(suite, home, options.only, options.fresh)


def run_here(plan: Plan, dry_run: bool, stop_on_failure: bool) -> None:
    """Runs on this machine and reports.

    Raises:
        FewstepError: if runs were changed or have failed; those that could be were run.
        SystemExit: with status 130, when it was asked to stop.
    """
    print_plan(plan)
    if dry_run:
        return
    refuse_changed(plan)
    try:
        run_plan(plan, stop_on_failure)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None
    failed = failures(plan)
    if plan.in_state(State.DONE):
        report(plan)
    if failed:
        count = len(plan.in_state(State.FAILED, State.BLOCKED, State.PARTLY))
        total = sum(cell.wanted for cell in plan.cells)
        raise FewstepError(
            f"{count} of {total} runs are not done.\n{failed}\nThe same command tries them again."
        )


def submit_plan(plan: Plan, options: ClusterOptions, at_once: int | None) -> None:
    """Submits to SLURM.

    Raises:
        FewstepError: if runs were changed, or SLURM is missing or refuses.
    """
    from scripts.suite.cluster import submit

    print_plan(plan)
    refuse_changed(plan)
    submit(plan, options, at_once)


# ---------------------------------------------------------------------- a single run


def run_task(plan: Plan, number: int) -> None:
    """Runs one task of the plan in this process, for schedulers other than SLURM.

    Raises:
        FewstepError: if there is no such task, or it cannot run.
    """
    if number >= len(plan.cells):
        raise FewstepError(f"There is no task {number}: the plan has 0 to {len(plan.cells) - 1}.")
    cell = plan.cells[number]
    if cell.standing.state is State.CHANGED:
        refuse_changed(Plan(plan.suite, plan.home, [cell]))
    if not cell.open:
        print(f"{cell.name}: {cell.standing.state}; nothing to do")
        return
    refuse_waiting(cell)
    run_command(command_of(cell.folder, cell.prepare(LOCAL)))


def refuse_waiting(cell: Cell) -> None:
    """Raises FewstepError if a run that this one needs is not done."""
    for parent in cell.parents:
        if parent.standing.state is not State.DONE:
            raise FewstepError(
                f"{cell.name} needs {parent.name}, which is {parent.standing.state}."
            )


def run_folder(run: Path) -> None:
    """Runs what was submitted for a folder, in this process.

    Raises:
        FewstepError: if nothing was.
    """
    config = run / CLUSTER / "config.yaml"
    if not config.is_file():
        raise FewstepError(
            f"There is no '{config}': --task takes a number of the plan, or the folder of a run "
            "that `fewstep suite --submit` has made."
        )
    run_command(command_of(run, config))
