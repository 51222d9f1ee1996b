"""What a suite ends in: a table of means and spreads over seeds, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.errors import FewstepError
from scripts.report import build_report
from scripts.suite.curves import write_curves
from scripts.suite.plan import Plan
from scripts.suite.states import State
from scripts.suite.tables import Rows, markdown, numbers_of


def report(plan: Plan) -> None:
    """Writes ``summary.md`` and ``report.html`` of all runs that are done, and prints the first.

    Where a grid goes through numbers, also tables and a picture against each of them.

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
    for path in write_curves(plan):
        print(f"Curves: {path}")
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
