"""Which charts a report has: quality against cost, and training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from scripts.report.boards import Board, Row
from scripts.report.charts import COLOURS, Axis, Frame, Points, Series, key, line_chart, usable
from scripts.report.data import Run
from scripts.report.findings import figure

FAMILIES = {
    "train": "Training",
    "val": "Validation",
    "eval": "Evaluation during training",
    "throughput": "Throughput",
}
SMOOTHED = ("train", "throughput")
MOST_POINTS = 400
LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which a curve gets a logarithmic axis."""


def legend(names: Sequence[tuple[int, str]]) -> str:
    """A legend of (style, name) pairs."""
    items = "".join(f"<li>{key(style)}{escape(name)}</li>" for style, name in names)
    return f'<ul class="legend">{items}</ul>'


# ---------------------------------------------------------------------- quality against cost


def quality_section(board: Board) -> str:
    """A metric against the cost of a sample, and against the cost of training."""
    names = [(_style(board, row), board.name_of(row)) for row in board.rows]
    charts = [_sampling_chart(board), _training_chart(board)]
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in charts
        if svg
    )
    missing = [row.run.label for row in board.rows if not row.run.device_hours]
    note = ""
    if missing:
        note = "Training cost is not recorded for " + ", ".join(dict.fromkeys(missing)) + "."
    odd = " Lines of another protocol are drawn too; see the footnotes." * bool(board.odd_rows())
    return (
        f"<h3>{escape(board.metric)}</h3>{legend(names)}"
        f'<div class="charts">{figures}</div><p class="note">{escape(note + odd)}</p>'
    )


def _style(board: Board, row: Row) -> int:
    """The run's own looks; further roles of a run keep its colour and get another dash."""
    earlier = [r for r in board.rows if r.run is row.run].index(row)
    return row.run.position + 2 * COLOURS * earlier


def _sampling_chart(board: Board) -> tuple[str, str]:
    x, y = Axis("network evaluations a sample", log=True), Axis(board.metric, log=True)
    series = []
    for row in board.rows:
        cells = {c.evaluations: (steps, c) for steps, c in sorted(row.cells.items())}
        points = usable([(e, c.mean) for e, (_, c) in sorted(cells.items())], x, y)
        hints = [f"{board.name_of(row)}, {cells[int(e)][0]} steps: {figure(v)}" for e, v in points]
        series.append(Series(_style(board, row), points, hints=hints))
    ticks: list[float] = []
    for value in sorted({p[0] for s in series for p in s.points}):
        if not ticks or value >= 1.5 * ticks[-1]:
            ticks.append(value)
    x = Axis(x.title, log=True, ticks=ticks)
    caption = f"{board.metric} against the cost of a sample, both logarithmic."
    return line_chart(series, x, y, caption), caption


def _training_chart(board: Board) -> tuple[str, str]:
    x, y = Axis("device hours of training", log=True), Axis(board.metric, log=True)
    series = []
    for row in board.rows:
        # A teacher measured within a student's run did not cost what that run cost.
        if row.role == "teacher" or not row.run.device_hours:
            continue
        hours = row.run.device_hours
        cells = [(str(n), c.mean) for n, c in sorted(row.cells.items()) if c.finite and c.mean > 0]
        series.append(
            Series(
                _style(board, row),
                [(hours, mean) for _, mean in cells],
                hints=[f"{board.name_of(row)}, {n} steps: {figure(v)}" for n, v in cells],
                labels=[n for n, _ in cells],
            )
        )
    caption = (
        f"{board.metric} against the cost of training, both logarithmic; numbers beside points are "
        "sampling steps. A student's cost does not include its teacher's."
    )
    return line_chart(series, x, y, caption), caption


# ---------------------------------------------------------------------- training curves


def curves_section(runs: Sequence[Run]) -> str:
    """Small charts of everything logged during training, one a name."""
    names = sorted({name for run in runs for name in run.curves})
    shown = [n for n in names if n.split("/")[0] in FAMILIES]
    if not shown:
        return '<p class="note">None of these runs has logged anything.</p>'
    drawn = {i for i, run in enumerate(runs) if any(n in run.curves for n in shown)}
    parts = [legend([(i, run.label) for i, run in enumerate(runs) if i in drawn])]
    once: list[str] = []
    for family, title in FAMILIES.items():
        charts = []
        for name in (n for n in shown if n.split("/")[0] == family):
            if any(len(run.curves.get(name, [])) > 1 for run in runs):
                charts.append(_curve_chart(runs, name, smooth=family in SMOOTHED))
            else:
                once.append(name)
        if charts:
            parts.append(f'<h3>{title}</h3><div class="multiples">{"".join(charts)}</div>')
    if once:
        listed = ", ".join(once)
        parts.append(f'<p class="note">Logged only once, so no curve: {escape(listed)}.</p>')
    return "".join(parts)


def _curve_chart(runs: Sequence[Run], name: str, smooth: bool) -> str:
    curves = [(i, run.curves.get(name, [])) for i, run in enumerate(runs)]
    finite = [v for _, curve in curves for _, v in curve if math.isfinite(v)]
    log = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > LOG_FROM
    x, y = Axis("student updates"), Axis(name, log=log)
    series, lost = [], 0
    for style, curve in curves:
        points = usable(curve, x, y)
        lost += len(curve) - len(points)
        line = running_mean(points) if smooth else points
        faint = downsample(points) if smooth and line != points else ()
        marked = len(points) <= 12
        series.append(Series(style, downsample(line), faint=faint, marked=marked))
    remarks = ["logarithmic"] * log + [f"{lost} values not finite"] * bool(lost)
    frame = Frame(width=320, height=200, left=48, right=12, top=8, bottom=36, font=11)
    svg = line_chart(series, x, y, name, frame)
    remark = f" <small>{', '.join(remarks)}</small>" if remarks else ""
    empty = "" if svg else "<p>Nothing to draw.</p>"
    return f"<figure><figcaption>{escape(name)}{remark}</figcaption>{svg}{empty}</figure>"


def running_mean(points: Points) -> list[tuple[float, float]]:
    """A centred running mean over a twelfth of a curve; short curves stay as they are.

    Towards the ends the window shrinks on both sides alike, which keeps it centred, and the line
    stops where less than half of it is left.
    """
    reach = len(points) // 24
    if reach < 1:
        return list(points)
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    smooth = []
    for i, (step, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        if 2 * half >= reach:
            smooth.append((step, (totals[i + half + 1] - totals[i - half]) / (2 * half + 1)))
    return smooth


def downsample(points: Points) -> list[tuple[float, float]]:
    """At most 400 points, with the lowest and highest of each stretch, so that spikes stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
    count = MOST_POINTS // 2
    bounds = [len(points) * i // count for i in range(count + 1)]
    kept: list[tuple[float, float]] = []
    for first, end in pairwise(bounds):
        stretch = points[first:end]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept
