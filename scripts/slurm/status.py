"""``fewstep submit --status``: what became of the jobs of runs."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.networks.loading import newest_checkpoint
from scripts.slurm.queue import accounted, queued

LOG_LINES = 6
# States in which a log's end is no news.
CALM = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "COMPLETED"}
COLUMNS = ("run", "job", "state", "update", "checkpoint")


@dataclass(frozen=True)
class JobStatus:
    """One run's job.

    Attributes:
        state: SLURM's word; ``ENDED`` if neither SLURM nor the job itself left one.
        update: the newest update in the run's metrics.
        log: the last lines of the log of a job that failed.
    """

    run: Path
    job: str
    state: str
    update: int
    max_steps: int
    checkpoint: str
    log: list[str]

    def row(self, folder: Path) -> tuple[str, ...]:
        """The columns of the table."""
        name = str(self.run.relative_to(folder)) if self.run != folder else self.run.name
        return name, self.job, self.state, f"{self.update} / {self.max_steps}", self.checkpoint


def print_status(folder: Path) -> None:
    """Prints a table of all submitted runs below a folder, and why some failed.

    Raises:
        FewstepError: if there are none.
    """
    found = statuses(folder)
    if not found:
        raise FewstepError(
            f"No run below '{folder}' was submitted. `fewstep submit -c EXPERIMENT` submits one."
        )
    rows = [COLUMNS, *(status.row(folder) for status in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    for status in found:
        if status.log:
            print(f"\n{status.run} ends with:")
            print("\n".join(f"  {line}" for line in status.log))


def statuses(folder: Path) -> list[JobStatus]:
    """The jobs of all runs below a folder, in the order of names and versions."""
    runs = [path.parent.parent for path in folder.rglob("slurm/job.json")]
    runs.sort(key=lambda run: (run.parent, len(run.name), run.name))
    records = {run: json.loads((run / "slurm" / "job.json").read_text()) for run in runs}
    waiting = queued()
    gone = [record["job"] for record in records.values() if record["job"] not in waiting]
    states = accounted(gone) | waiting
    return [status_of(run, record, states) for run, record in records.items()]


def status_of(run: Path, record: dict[str, str], states: dict[str, str]) -> JobStatus:
    """One run's status, from its folder and what SLURM said."""
    job, max_steps = record["job"], int(record["max_steps"])
    state = states.get(job) or own_account(run)
    checkpoint = newest_checkpoint(run)
    return JobStatus(
        run=run,
        job=job,
        state=state,
        update=newest_update(run),
        max_steps=max_steps,
        checkpoint=checkpoint.resolve().name if checkpoint else "none yet",
        log=[] if state in CALM else end_of_log(run),
    )


def own_account(run: Path) -> str:
    """The state by the exit status that the batch script wrote down."""
    path = run / "slurm" / "exit"
    status = path.read_text().strip() if path.is_file() else ""
    if not status:
        return "ENDED"
    return "COMPLETED" if status == "0" else f"FAILED ({status})"


def newest_update(run: Path) -> int:
    """The update of the last whole line of the metrics; 0 if there are none."""
    for line in reversed(tail(run / "metrics.csv", 5)):
        step = line.split(",")[0]
        if step.isdigit() and line.count(",") == 3:
            return int(step)
    return 0


def end_of_log(run: Path) -> list[str]:
    """The last lines of the newest log that speaks of an error, or of the newest at all."""
    logs = sorted((run / "slurm").glob("*.out"), key=lambda path: path.stat().st_mtime)
    ends = [lines for path in reversed(logs) if (lines := tail(path, LOG_LINES))]
    failed = [lines for lines in ends if any("error" in line.lower() for line in lines)]
    return (failed or ends or [["no log was written"]])[0]


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a file that are not blank, read from its last 64 KiB."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        text = file.read().decode(errors="replace")
    return list(deque((line for line in text.splitlines() if line.strip()), maxlen=count))
