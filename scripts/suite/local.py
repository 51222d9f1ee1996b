"""Runs what a suite still needs on this machine, one after the other."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, Never, TypeAlias

import yaml
from tqdm import tqdm

from callbacks.preemption import EXIT_STATUS
from fewstep.errors import FewstepError
from scripts.slurm.status import newest_update as newest_logged
from scripts.slurm.status import tail
from scripts.suite.plan import Cell, Plan
from scripts.suite.states import LOCAL, Standing, State, newest_update, reason, standing_of
from scripts.this_fewstep import this_fewstep

LOG = "fit.out"
Bar: TypeAlias = "tqdm[Never]"  # it counts and goes through nothing
LOOK_EVERY = 0.5
TAIL = 8


def run_plan(plan: Plan, stop_on_failure: bool = False) -> None:
    """Trains and measures every open run of a plan; what failed is noted in it.

    Raises:
        KeyboardInterrupt: when asked to stop, after the current run has saved.
    """
    cells = plan.open
    bar: Bar = tqdm(
        total=len(cells), unit="run", desc=plan.suite.name, disable=None if cells else True
    )
    with only_one(plan.home) as held, stoppable(), bar:
        for cell in cells:
            hindering = [p for p in cell.parents if p.standing.state is not State.DONE]
            if hindering:
                why = f"{hindering[0].name} {hindering[0].standing.state}"
                cell.standing = Standing(State.BLOCKED, why)
            else:
                run_cell(cell, bar, held)
            bar.update()
            if stop_on_failure and cell.standing.state is State.FAILED:
                return


def run_cell(cell: Cell, bar: Bar, held: IO[str]) -> None:
    """One run, in a process of its own whose output goes to its log."""
    bar.write(f"{cell.name}: starts; log {cell.folder / LOCAL / LOG}", sys.stdout)
    config = cell.prepare(LOCAL)
    ended = config.with_name("exit")
    ended.unlink(missing_ok=True)
    status = run_process(command_of(cell.folder, config), cell, bar, held)
    ended.write_text(f"{status}\n")
    cell.standing = standing_of(cell.folder, cell.asked, {})
    if cell.standing.state is not State.DONE and status != EXIT_STATUS:
        cell.standing = Standing(State.FAILED, reason(status))
    detail = f" ({cell.standing.detail})" if cell.standing.detail else ""
    bar.write(f"{cell.name}: {cell.standing.state}{detail}", sys.stdout)


def command_of(run: Path, config: Path) -> list[str]:
    """The arguments of fewstep that bring a run to its end from wherever it is."""
    place = ["-c", str(config), "--run.version", run.name]
    max_steps = yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"]["max_steps"]
    if newest_update(run) >= max_steps > 0:
        # Training that has ended is not entered again, so nothing would be measured.
        return ["evaluate", *place]
    return ["fit", *place, "--ckpt_path", "last"]


def run_process(arguments: list[str], cell: Cell, bar: Bar, held: IO[str]) -> int:
    """Runs fewstep with its output in the run's log; returns its exit status.

    Raises:
        KeyboardInterrupt: after passing on the wish to stop and waiting; a second one kills.
    """
    with (cell.folder / LOCAL / LOG).open("a", encoding="utf-8") as file:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        print(f"\n{now} fewstep {' '.join(arguments)}", file=file, flush=True)
        # A session of its own: Ctrl-C in the terminal reaches the suite alone, which passes it on
        # as the signal that training saves at. The lock stays held as long as the run lives.
        process = subprocess.Popen(
            [*this_fewstep(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[held.fileno()],
        )
        held.truncate(0)
        print(process.pid, file=held, flush=True)
        try:
            while True:
                show(cell, bar)
                try:
                    return process.wait(LOOK_EVERY)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            bar.write(f"{cell.name}: saving; once more stops at once", sys.stdout)
            process.terminate()
            try:
                process.wait()
            finally:
                process.kill()
            raise


def show(cell: Cell, bar: Bar) -> None:
    """The live line: which run, and how far it is."""
    update = max(newest_logged(cell.folder), newest_update(cell.folder))
    bar.set_postfix_str(f"{cell.name}: update {update:,} of {cell.asked.max_steps:,}")


@contextmanager
def only_one(home: Path) -> Iterator[IO[str]]:
    """Holds the suite's folder; its runs inherit the hold, so that an orphan is noticed.

    Raises:
        FewstepError: if somebody else holds it.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = home / ".lock"
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            last = f" (process {pid})" if (pid := lock.read_text().strip()) else ""
            raise FewstepError(
                f"Another `fewstep suite`, or a run that it left behind{last}, still works in "
                f"'{home}'. Wait for it, or stop it with Ctrl-C or `kill`: it saves first."
            ) from error
        yield held


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM stops a suite as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failures(plan: Plan) -> str:
    """What failed with the end of its log, and what had to be left; empty if all went well."""
    parts = []
    for cell in plan.in_state(State.FAILED):
        log = cell.folder / LOCAL / LOG
        lines = "\n".join(f"  {line}" for line in tail(log, TAIL))
        parts.append(f"{cell.name} failed ({cell.standing.detail}); {log} ends with:\n{lines}")
    for cell in plan.in_state(State.PARTLY, State.BLOCKED):
        parts.append(f"{cell.name} is {cell.standing.state}: {cell.standing.detail}.")
    return "\n".join(parts)
