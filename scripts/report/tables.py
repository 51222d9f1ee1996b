"""The tables of a report: leaderboard, findings and training cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from string import ascii_lowercase

from scripts.report.boards import Board, Row
from scripts.report.data import Run, number
from scripts.report.findings import Finding, figure, findings, spread

DASH = "–"
MOST_FINDINGS = 24


# ---------------------------------------------------------------------- leaderboard


def leaderboard(board: Board, number_of: int) -> str:
    """One metric's table with its footnotes.

    Args:
        number_of: the table's place on the page, which makes its anchors unique.
    """
    marks = _marks(board)
    heads = "".join(f"<th>{n} step{'s' * (n != 1)}</th>" for n in board.steps)
    bodies = "".join(
        f'<tbody class="{kind}">{"".join(_row(board, r, marks, number_of) for r in rows)}</tbody>'
        for kind, rows in (
            ("teachers", [r for r in board.rows if r.is_teacher]),
            ("students", [r for r in board.rows if not r.is_teacher]),
        )
        if rows
    )
    direction = {True: "lower is better", False: "higher is better", None: "direction unknown"}
    return (
        f"<h3>{escape(board.metric)} <small>{direction[board.lower]}</small></h3>"
        f'<div class="scroll"><table class="sortable"><thead><tr><th>run</th>'
        f"{heads}</tr></thead>{bodies}</table></div>"
        f'<p class="note">Bold is the best at a step count, where at least two rows compare. '
        f"{escape(_samples_note(board))}</p>{_footnotes(board, marks, number_of)}"
    )


def _marks(board: Board) -> dict[str, str]:
    """A letter for each protocol that is not the common one."""
    odd = dict.fromkeys(row.signature for row in board.odd_rows())
    return {s: ascii_lowercase[i % 26] * (1 + i // 26) for i, s in enumerate(odd)}


def _row(board: Board, row: Row, marks: dict[str, str], number_of: int) -> str:
    mark = marks.get(row.signature, "")
    sup = f' <sup><a href="#odd-{number_of}-{mark}">{mark}</a></sup>' if mark else ""
    cells = "".join(_cell(board, row, steps) for steps in board.steps)
    odd = ' class="odd"' if mark else ""
    return (
        f"<tr{odd}><th>{escape(row.run.label)}{sup}"
        f"<small>{escape(row.role)}, {escape(row.run.method)}</small></th>{cells}</tr>"
    )


def _cell(board: Board, row: Row, steps: int) -> str:
    cell = row.cells.get(steps)
    if cell is None:
        return f'<td class="number" data-value="">{DASH}</td>'
    best = row in board.best(steps)
    value = f"<strong>{figure(cell.mean)}</strong>" if best else figure(cell.mean)
    if cell.deviation is not None:
        value += f" ± {spread(cell.mean, cell.deviation)}"
    if not cell.finite:
        value = "not finite"
    notes = []
    if len(cell.values) > 1:
        notes.append(f"{len(cell.values)} seeds")
    if cell.evaluations != steps:
        notes.append(f"{cell.evaluations} evaluations")
    small = f"<small>{', '.join(notes)}</small>" if notes else ""
    data = repr(cell.mean) if cell.finite else ""
    return f'<td class="number" data-value="{data}">{value}{small}</td>'


def _samples_note(board: Board) -> str:
    usual = next(row for row in board.rows if row.signature == board.common)
    note = f"Each number is over {usual.conditions['num_samples']} generated samples"
    cells = [cell for row in board.rows for cell in row.cells.values()]
    if any(len(c.values) > 1 for c in cells):
        note += "; ± is the standard deviation over seeds of the sampling noise"
    note += "."
    if any(c.evaluations != n for row in board.rows for n, c in row.cells.items()):
        note += (
            " Where guidance, or anything else, costs more network evaluations than there are "
            "steps, the cell says how many a sample takes."
        )
    return note


def _footnotes(board: Board, marks: dict[str, str], number_of: int) -> str:
    """What exactly differs in rows that were measured otherwise than most."""
    items = []
    for signature, mark in marks.items():
        rows = [row for row in board.rows if row.signature == signature]
        names = ", ".join(dict.fromkeys(board.name_of(row) for row in rows))
        differing = "; ".join(board.differences(rows[0]))
        items.append(
            f'<li id="odd-{number_of}-{mark}"><b>{mark}</b> Not comparable with the other rows: '
            f"{escape(names)} was measured otherwise. {escape(differing)}.</li>"
        )
    return f'<ul class="footnotes">{"".join(items)}</ul>' if items else ""


# ---------------------------------------------------------------------- findings


def findings_section(board: Board) -> str:
    """The statements about one metric, as a list."""
    found = findings(board)
    if not found:
        return ""
    first, rest = found[:MOST_FINDINGS], found[MOST_FINDINGS:]
    more = ""
    if rest:
        more = f"<details><summary>{len(rest)} more</summary>{_listed(rest)}</details>"
    return f"<h3>{escape(board.metric)}</h3>{_listed(first)}{more}"


def _listed(found: Sequence[Finding]) -> str:
    items = "".join(
        f'<li><span class="verdict {f.verdict}">{f.verdict}</span>'
        f"<span>{escape(f.text)}</span></li>"
        for f in found
    )
    return f'<ul class="findings">{items}</ul>'


# ---------------------------------------------------------------------- training cost


def cost_table(runs: Sequence[Run]) -> str:
    """What training each run has cost."""
    heads = (
        "run",
        "updates",
        "samples",
        "seconds",
        "devices",
        "device hours",
        "samples/s",
        "passes a sample",
        "passes in all",
    )
    rows = "".join(
        f"<tr><th>{escape(run.label)}<small>{escape(run.method)}</small></th>"
        f"{''.join(_count(value) for value in _costs(run))}</tr>"
        for run in runs
    )
    return (
        '<div class="scroll"><table class="sortable"><thead><tr>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{rows}</tbody></table>"
        '</div><p class="note">Passes are forward equivalents: a backward pass counts as two. '
        "Seconds are of training alone, over all resumptions, without evaluation.</p>"
    )


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


def _count(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return f'<td class="number" data-value="">{DASH}</td>'
    # Thin spaces between thousands, as counts of samples run into the millions.
    whole = abs(value) >= 100 or value == round(value)
    shown = f"{value:,.0f}".replace(",", "\u2009") if whole else figure(value)
    return f'<td class="number" data-value="{value!r}">{shown}</td>'
