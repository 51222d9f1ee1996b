"""What a suite ends in: a table of means and spreads over seeds, and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.results import FILE_NAME, read_results
from fewstep.errors import FewstepError
from scripts.report import build_report
from scripts.suite.plan import Plan
from scripts.suite.states import State

Rows = dict[str, dict[int, list[float]]]


def report(plan: Plan) -> None:
    """Writes ``summary.md`` and ``report.html`` of all runs that are done, and prints the first.

    Raises:
        FewstepError: if none is done.
    """
    runs: dict[str, list[Path]] = {}
    for cell in plan.cells:
        if cell.standing.state is State.DONE:
            runs.setdefault(cell.variant.label, []).append(cell.folder)
    if not runs:
        raise FewstepError(f"No run of the suite '{plan.suite.name}' is done; nothing to report.")
    table = summary(runs)
    (plan.home / "summary.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    folders = [folder for found in runs.values() for folder in found]
    print(f"Report: {build_report(folders, plan.home / 'report.html', plan.suite.name)}")


def summary(runs: Mapping[str, Sequence[Path]]) -> str:
    """Markdown tables of all metrics by sampling steps, a line for each label.

    Args:
        runs: the run folders of each label, one a training seed.
    """
    found: dict[str, Rows] = {}
    for label, folders in runs.items():
        for folder in folders:
            for (metric, row, steps), value in numbers_of(folder, label).items():
                cells = found.setdefault(metric, {}).setdefault(row, {})
                cells.setdefault(steps, []).append(value)
    seeds = max(map(len, runs.values()))
    spread = f", mean ± standard deviation over up to {seeds} training seeds" if seeds > 1 else ""
    tables = (
        f"`{metric}` by sampling steps{spread}\n\n{markdown(rows)}"
        for metric, rows in found.items()
    )
    return "\n".join(tables)


def numbers_of(folder: Path, label: str) -> dict[tuple[str, str, int], float]:
    """One run's numbers by metric, row and steps, each the mean over the seeds of its noise.

    Of measurements with different numbers of samples those with the most count.
    """
    entries: list[dict[str, Any]] = read_results(folder / FILE_NAME)["measurements"]
    roles = dict.fromkeys(entry["role"] for entry in entries)
    most = max((entry["num_samples"] for entry in entries), default=0)
    values: dict[tuple[str, str, int], list[float]] = {}
    for entry in entries:
        if entry["num_samples"] == most:
            row = f"{label} ({entry['role']})" if len(roles) > 1 else label
            key = (entry["metric"], row, entry["num_steps"])
            values.setdefault(key, []).append(float(entry["value"]))
    return {key: statistics.fmean(found) for key, found in values.items()}


def markdown(rows: Rows) -> str:
    """A Markdown table of values by label and number of steps."""
    columns = sorted({steps for cells in rows.values() for steps in cells})
    lines = [
        "| run | " + " | ".join(map(str, columns)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, cells in rows.items():
        lines.append(f"| {label} | " + " | ".join(cell(cells.get(c)) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float] | None) -> str:
    """Mean and standard deviation of some values."""
    if not values:
        return "–"
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
