"""The leaderboards: a metric by step count, and all metrics at one step count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from string import ascii_lowercase

from scripts.report.boards import Board, Row
from scripts.report.boards import Cell as Scored
from scripts.report.findings import figure, spread
from scripts.report.table import DASH, Better, Cell, Column, Line, Table, to_html


def leaderboard_table(board: Board) -> Table:
    """One metric by sampling steps."""
    marks = _marks(board)
    best = {steps: board.best(steps) for steps in board.steps}
    better: Better = "lower" if board.lower else "higher"
    return Table(
        name=f"leaderboard-{slug(board.metric)}",
        title=f"{board.metric} by sampling steps, {better} is better",
        columns=[Column(_steps(n), better) for n in board.steps],
        lines=[_line(board, row, marks, best) for row in board.rows],
    )


def leaderboard(board: Board, table: Table) -> str:
    """One metric's table with its footnotes."""
    better = "lower" if board.lower else "higher"
    return (
        f"<h3>{escape(board.metric)} <small>{better} is better</small></h3>{to_html(table)}"
        f'<p class="note">Bold is the best at a step count, where at least two rows compare. '
        f"{escape(_samples_note(board))}</p>{_footnotes(board, table)}"
    )


def slug(text: str) -> str:
    """A name that can be a file's, and an anchor."""
    return re.sub(r"[^\w.-]+", "_", text)


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _marks(board: Board) -> dict[str, str]:
    """A letter for each protocol that is not the common one."""
    odd = dict.fromkeys(row.signature for row in board.odd_rows())
    return {s: ascii_lowercase[i % 26] * (1 + i // 26) for i, s in enumerate(odd)}


def _line(board: Board, row: Row, marks: dict[str, str], best: dict[int, list[Row]]) -> Line:
    members, count = [], len(row.runs)
    for run in row.runs if count > 1 else ():
        cells = row.of_run(run)
        shown = [_cell(cells.get(steps), steps) for steps in board.steps]
        members.append(Line(row.group.shown(run), shown, run.version))
    return Line(
        name=row.group.label,
        cells=[
            _cell(row.cells.get(steps), steps, count, row in best[steps]) for steps in board.steps
        ],
        small=f"{row.role}, {row.group.method}",
        group=row.group.position,
        mark=marks.get(row.signature, ""),
        teacher=row.is_teacher,
        members=members,
    )


def _cell(cell: Scored | None, steps: int, runs: int = 1, best: bool = False) -> Cell:
    """A cell of a row that stands for some runs."""
    if cell is None:
        return Cell(DASH)
    notes = []
    if len(cell.by_run) < runs:
        notes.append(f"{len(cell.by_run)} of {runs} runs")
    if len(cell.by_run) == 1 and len(cell.values) > 1:
        notes.append(f"{len(cell.values)} seeds")
    if cell.evaluations != steps:
        notes.append(f"{cell.evaluations} evaluations")
    small = ", ".join(notes)
    if not cell.finite:
        return Cell("not finite", small=small)
    deviation = cell.deviation
    shown = "" if deviation is None else spread(cell.mean, deviation)
    return Cell(figure(cell.mean), cell.mean, shown, deviation, small, best)


def _samples_note(board: Board) -> str:
    usual = next(row for row in board.rows if row.signature == board.common)
    note = f"Each number is over {usual.conditions['num_samples']} generated samples"
    cells = [cell for row in board.rows for cell in row.cells.values()]
    if any(len(c.by_run) > 1 for c in cells):
        note += "; ± is the standard deviation over training runs that differ only in their seed"
    if any(len(c.by_run) == 1 and len(c.values) > 1 for c in cells):
        note += "; ± of a single run is the standard deviation over seeds of the sampling noise"
    note += "."
    if any(c.evaluations != n for row in board.rows for n, c in row.cells.items()):
        note += (
            " Where guidance, or anything else, costs more network evaluations than there are "
            "steps, the cell says how many a sample takes."
        )
    return note


def _footnotes(board: Board, table: Table) -> str:
    """What exactly differs in rows that were measured otherwise than most."""
    items = []
    for signature, mark in _marks(board).items():
        rows = [row for row in board.rows if row.signature == signature]
        names = ", ".join(dict.fromkeys(board.name_of(row) for row in rows))
        differing = "; ".join(board.differences(rows[0]))
        items.append(
            f'<li id="{table.name}-{mark}"><b>{mark}</b> Not comparable with the other rows: '
            f"{escape(names)} was measured otherwise. {escape(differing)}.</li>"
        )
    return f'<ul class="footnotes">{"".join(items)}</ul>' if items else ""


# ---------------------------------------------------------------------- all metrics


def overview_tables(boards: Sequence[Board]) -> dict[int, Table]:
    """All metrics side by side, by step count; each metric under its common protocol."""
    if len(boards) < 2:
        return {}
    found = {}
    for steps in sorted({n for board in boards for n in board.steps}):
        shown = [b for b in boards if any(steps in r.cells for r in _comparable(b))]
        rows = {(r.group.position, r.role): r for b in shown for r in _comparable(b)}
        found[steps] = Table(
            name=f"overview-{steps}-steps",
            title=f"All metrics at {_steps(steps)}",
            columns=[Column(b.metric, "lower" if b.lower else "higher") for b in shown],
            lines=[
                _overview_line(shown, row, steps)
                for row in rows.values()
                if any(steps in _cells_of(b, row) for b in shown)
            ],
        )
    return found


def _comparable(board: Board) -> list[Row]:
    return [row for row in board.rows if row.signature == board.common]


def _row_of(board: Board, like: Row) -> Row | None:
    same = (r for r in _comparable(board) if (r.group, r.role) == (like.group, like.role))
    return next(same, None)


def _cells_of(board: Board, like: Row) -> dict[int, Scored]:
    row = _row_of(board, like)
    return {} if row is None else row.cells


def _overview_line(boards: Sequence[Board], row: Row, steps: int) -> Line:
    cells = []
    for board in boards:
        best = any(r is _row_of(board, row) for r in board.best(steps))
        cells.append(_cell(_cells_of(board, row).get(steps), steps, best=best))
    return Line(
        name=row.group.label,
        cells=cells,
        small=f"{row.role}, {row.group.method}",
        group=row.group.position,
        teacher=row.is_teacher,
    )
