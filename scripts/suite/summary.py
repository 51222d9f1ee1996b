"""What a suite ends in: a table of means and spreads over seeds, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.errors import FewstepError
from scripts.report import build_report
from scripts.suite.curves import write_curves
from scripts.suite.outcomes import left_out, outcomes
from scripts.suite.plan import Plan
from scripts.suite.tables import Rows, markdown, numbers_of


def report(plan: Plan) -> None:
    """Writes ``summary.md`` and ``report.html`` of all runs that are done, and prints the first.

    It says of how many runs a number is where some diverged, failed or are yet to come, and which.
    Where a grid goes through numbers, also tables and a picture against each of them.

    Raises:
        FewstepError: if none is done.
    """
    found = outcomes(plan)
    folders = [folder for outcome in found.values() for folder in outcome.done]
    if not folders:
        raise FewstepError(f"No run of the suite '{plan.suite.name}' is done; nothing to report.")
    tried = {variant: outcome for variant, outcome in found.items() if outcome.tried}
    runs = {
        variant.label + (f" ({outcome.shortfall})" if outcome.shortfall else ""): outcome.done
        for variant, outcome in tried.items()
    }
    table = "\n".join(filter(None, [summary(runs), left_out(found)]))
    (plan.home / "summary.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    for path in write_curves(plan):
        print(f"Curves: {path}")
    print(f"Report: {build_report(folders, plan.home / 'report.html', plan.suite.name)}")


def summary(runs: Mapping[str, Sequence[Path]]) -> str:
    """Markdown tables of all metrics by sampling steps, a line for each label.

    Args:
        runs: the run folders of each label, one a training seed; a label without any has a line
            without numbers.
    """
    found: dict[str, Rows] = {}
    for label, folders in runs.items():
        for folder in folders:
            for (metric, row, steps), value in numbers_of(folder, label).items():
                cells = found.setdefault(metric, {}).setdefault(row, {})
                cells.setdefault(steps, []).append(value)
    for label, folders in runs.items():
        for rows in found.values() if not folders else ():
            rows[label] = {}
    seeds = max(map(len, runs.values()))
    spread = f", mean ± standard deviation over up to {seeds} training seeds" if seeds > 1 else ""
    tables = (
        f"`{metric}` by sampling steps{spread}\n\n{markdown(rows)}"
        for metric, rows in found.items()
    )
    return "\n".join(tables)
