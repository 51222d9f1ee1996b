"""What training each run has cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scripts.report.data import Run, number
from scripts.report.findings import figure
from scripts.report.groups import Group
from scripts.report.table import DASH, Cell, Column, Line, Table, to_html

COLUMNS = (
    "updates",
    "samples",
    "seconds",
    "devices",
    "device hours",
    "samples/s",
    "passes a sample",
    "passes in all",
)


def cost_table(groups: Sequence[Group]) -> Table:
    """One row a group, the mean of its runs, which are folded away below it."""
    return Table(
        name="cost",
        title="Training cost",
        columns=[Column(name) for name in COLUMNS],
        lines=[_line(group) for group in groups],
    )


def cost_section(table: Table) -> str:
    """The table with what its words mean."""
    return (
        f'{to_html(table)}<p class="note">Passes are forward equivalents: a backward pass counts '
        "as two. Runs that differ only in their seed are averaged. Seconds are of training alone, "
        "over all resumptions, without evaluation.</p>"
    )


def _line(group: Group) -> Line:
    costs = [_costs(run) for run in group.runs]
    members = []
    if len(costs) > 1:
        members = [
            Line(group.shown(run), [_count(v) for v in cost], run.version)
            for run, cost in zip(group.runs, costs, strict=True)
        ]
    means = [_mean([v for v in column if v is not None]) for column in zip(*costs, strict=True)]
    cells = [_count(mean) for mean in means]
    return Line(group.label, cells, group.method, group.position, members=members)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _costs(run: Run) -> list[float | None]:
    samples, seconds = number(run.training.get("samples")), number(run.training.get("seconds"))
    passes = number(run.training.get("forward_equivalents_per_sample"))
    return [
        run.updates,
        samples,
        seconds,
        number(run.training.get("devices")),
        run.device_hours,
        samples / seconds if samples is not None and seconds else None,
        passes,
        samples * passes if samples is not None and passes is not None else None,
    ]


def _count(value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(DASH)
    # Thin spaces between thousands, as counts of samples run into the millions.
    whole = abs(value) >= 100 or value == round(value)
    shown = f"{value:,.0f}".replace(",", "\u2009") if whole else figure(value)
    return Cell(shown, value)
