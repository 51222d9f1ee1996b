"""Which charts a report has: quality against cost, and training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from scripts.report.boards import Board, Row
from scripts.report.boards import Cell as Scored
from scripts.report.charts import (
    MOST_POINTS,
    Axis,
    Chart,
    Series,
    downsample,
    running_mean,
    usable,
)
from scripts.report.data import Run, natural
from scripts.report.findings import figure, spread
from scripts.report.groups import Group

FAMILIES = {
    "train": "Training",
    "val": "Validation",
    "eval": "Evaluation during training",
    "throughput": "Throughput",
}
SMOOTHED = ("train", "throughput")
LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which a curve gets a logarithmic axis."""

MOST_LINES_WITH_RAW = 12
POINTS_OF_ALL_LINES = 12_000
FEWEST_POINTS = 60


def chart_figure(chart: Chart, charts: list[Chart], caption: str) -> str:
    """A place on the page for a chart, which is added to those whose data the page holds."""
    if chart.empty:
        return f"<figure><figcaption>{caption}</figcaption><p>Nothing to draw.</p></figure>"
    charts.append(chart)
    return (
        f'<figure class="chart" data-chart="{len(charts) - 1}">'
        f'<figcaption>{caption}</figcaption><div class="plot"></div></figure>'
    )


# ---------------------------------------------------------------------- quality against cost


def quality_section(board: Board, charts: list[Chart]) -> str:
    """A metric against the cost of a sample, and against the cost of training."""
    figures = "".join(
        chart_figure(chart, charts, escape(chart.name))
        for chart in (_sampling_chart(board), _training_chart(board))
        if not chart.empty
    )
    unknown = [row.group.label for row in board.rows if not _device_hours(row)]
    note = "lower is better." if board.lower else "higher is better."
    if unknown:
        note += f" Training cost is not recorded for {', '.join(dict.fromkeys(unknown))}."
    note += " Lines of another protocol are drawn too; see the footnotes." * bool(board.odd_rows())
    return (
        f"<h3>{escape(board.metric)} <small>{escape(note)}</small></h3>"
        f'<div class="charts">{figures}</div>'
    )


def _variant(board: Board, row: Row) -> int:
    """Further rows of a group keep its colour and get another dash."""
    return [r for r in board.rows if r.group is row.group].index(row)


def _logarithmic(board: Board) -> bool:
    """Whether a metric's axis is logarithmic: not for shares and what can be negative."""
    values = [c.mean for row in board.rows for c in row.cells.values() if c.finite]
    return board.lower and bool(values) and min(values) > 0


def _series(
    board: Board, row: Row, points: Sequence[tuple[float, int, Scored]], axes: tuple[Axis, Axis]
) -> Series:
    """A row's line through (cost, steps, cell)."""
    drawn = [p for p in points if usable([(p[0], p[2].mean)], *axes)]
    return Series(
        row.group.position,
        board.name_of(row),
        [(cost, cell.mean) for cost, _, cell in drawn],
        variant=_variant(board, row),
        errors=[cell.deviation or 0.0 for _, _, cell in drawn],
        hints=[f"{steps} step{'s' * (steps != 1)}: {_said(cell)}" for _, steps, cell in drawn],
    )


def _said(cell: Scored) -> str:
    deviation = cell.deviation
    return figure(cell.mean) + (f" ± {spread(cell.mean, deviation)}" if deviation else "")


def _sampling_chart(board: Board) -> Chart:
    axes = Axis("network evaluations a sample", log=True), Axis(board.metric, _logarithmic(board))
    series = []
    for row in board.rows:
        cells = {c.evaluations: (steps, c) for steps, c in sorted(row.cells.items())}
        points = [(e, steps, cell) for e, (steps, cell) in sorted(cells.items())]
        series.append(_series(board, row, points, axes))
    ticks: list[float] = []
    for value in sorted({p[0] for s in series for p in s.points}):
        if not ticks or value >= 1.5 * ticks[-1]:
            ticks.append(value)
    x = Axis(axes[0].title, log=True, ticks=ticks)
    return Chart(f"{board.metric} against the cost of a sample", x, axes[1], series)


def _device_hours(row: Row) -> float | None:
    """What training has cost, on average over the row's runs."""
    hours = [run.device_hours for run in row.runs if run.device_hours]
    return sum(hours) / len(hours) if hours else None


def _training_chart(board: Board) -> Chart:
    axes = Axis("device hours of training", log=True), Axis(board.metric, _logarithmic(board))
    series = []
    for row in board.rows:
        hours = _device_hours(row)
        # A teacher measured within a student's run did not cost what that run cost.
        if row.role == "teacher" or not hours:
            continue
        made = _series(board, row, [(hours, n, c) for n, c in sorted(row.cells.items())], axes)
        labels = [hint.split(" ")[0] for hint in made.hints]
        series.append(
            Series(
                made.group, made.name, made.points, made.variant, hints=made.hints, labels=labels
            )
        )
    name = (
        f"{board.metric} against the cost of training; numbers beside points are sampling steps, "
        "and a student's cost does not include its teacher's"
    )
    return Chart(name, *axes, series)


# ---------------------------------------------------------------------- training curves


def curves_section(groups: Sequence[Group], charts: list[Chart]) -> str:
    """Small charts of everything logged during training, one a name."""
    runs = [run for group in groups for run in group.runs]
    names = sorted({name for run in runs for name in run.curves}, key=natural)
    shown = [n for n in names if n.split("/")[0] in FAMILIES]
    if not shown:
        return '<p class="note">None of these runs has logged anything.</p>'
    parts, once = [], []
    for family, title in FAMILIES.items():
        figures = []
        for name in (n for n in shown if n.split("/")[0] == family):
            if any(len(run.curves.get(name, [])) > 1 for run in runs):
                figures.append(_curve_figure(groups, name, family in SMOOTHED, charts))
            else:
                once.append(name)
        if figures:
            parts.append(f'<h3>{title}</h3><div class="multiples">{"".join(figures)}</div>')
    if once:
        listed = ", ".join(once)
        parts.append(f'<p class="note">Logged only once, so no curve: {escape(listed)}.</p>')
    return "".join(parts)


def _curve_figure(groups: Sequence[Group], name: str, smooth: bool, charts: list[Chart]) -> str:
    drawn = [(g, run, run.curves[name]) for g in groups for run in g.runs if name in run.curves]
    finite = [v for _, _, curve in drawn for _, v in curve if math.isfinite(v)]
    log = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_FROM
    # eval/METRIC/ROLE/STEPS: the head says the rest.
    title = name.split("/")[1] if name.startswith("eval/") else name.partition("/")[2]
    x, y = Axis("student updates"), Axis(title or name, log=log)
    most = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_ALL_LINES // max(1, len(drawn))))
    series, lost = [], 0
    for group, run, curve in drawn:
        points = usable(curve, x, y)
        lost += len(curve) - len(points)
        line = running_mean(points) if smooth else points
        raw = smooth and line != points and len(drawn) <= MOST_LINES_WITH_RAW
        series.append(
            Series(
                group.position,
                _name(group, run),
                downsample(line, most),
                faint=downsample(points, most) if raw else (),
                marked=len(points) <= 12 and len(drawn) <= MOST_LINES_WITH_RAW,
            )
        )
    remarks = ["logarithmic"] * log + [f"{lost} values not finite"] * bool(lost)
    remark = f" <small>{', '.join(remarks)}</small>" if remarks else ""
    return chart_figure(Chart(name, x, y, series), charts, f"{escape(name)}{remark}")


def _name(group: Group, run: Run) -> str:
    return f"{group.label}, {group.shown(run)}" if len(group.runs) > 1 else group.label
