"""What the numbers say, in sentences: students beside their teacher, PCM beside LCM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from scripts.report.boards import Board, Cell, Row
from scripts.report.groups import TEACHER_PATH, is_at

PHASED = "PhasedConsistencyDistillation"
CONSISTENCY = "ConsistencyDistillation"
MOST_FINDINGS = 24

Verdict = Literal["better", "worse", "equal", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One sentence, whether it is good news for its subject, and which group that is."""

    text: str
    verdict: Verdict
    group: int = -1


def figure(value: float) -> str:
    """A metric's value to three significant digits."""
    text = f"{value:#.3g}".rstrip(".")
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text


def spread(mean: float, deviation: float) -> str:
    """A standard deviation to as many decimals as its mean is shown with, if that is enough."""
    text = figure(mean)
    decimals = len(text.partition(".")[2]) if "e" not in text else 0
    rounded = f"{deviation:.{decimals}f}"
    return rounded if float(rounded) > 0 or deviation == 0 else figure(deviation)


def findings(board: Board) -> list[Finding]:
    """All statements about one metric."""
    return [*_against_teachers(board), *_phased_against_consistency(board)]


# ---------------------------------------------------------------------- students and teachers


def _against_teachers(board: Board) -> list[Finding]:
    teachers = [row for row in board.rows if row.is_teacher]
    students = [row for row in board.rows if not row.is_teacher]
    if not teachers and students:
        return [
            Finding(
                "No teacher is among these runs, so no student can be set beside one. Measure it "
                "with `fewstep evaluate`, with its run or --roles teacher, and report again.",
                "unknown",
            )
        ]
    found = []
    for student in students:
        comparable = [t for t in teachers if t.signature == student.signature]
        if not comparable:
            found.append(
                Finding(
                    f"{board.name_of(student)} is not set beside a teacher: none was measured "
                    "under the same protocol.",
                    "unknown",
                    student.group.position,
                )
            )
            continue
        teacher = _teacher_of(student, comparable)
        most = max(teacher.cells)
        whom = "the teacher" if len(teachers) == 1 else f"the teacher {board.name_of(teacher)}"
        for steps, cell in sorted(student.cells.items()):
            beside = f"{whom} at {_steps(most)}"
            found.append(_compare(board, student, steps, cell, beside, teacher.cells[most]))
    return found


def _teacher_of(student: Row, candidates: Sequence[Row]) -> Row:
    """The student's own teacher where that is known, at as many steps as it was measured at.

    Its own: the teacher role of its run, or the run its configuration names. Otherwise any; one of
    the same version (the same seed, in the demo) is preferred.
    """
    path = student.group.first.config.get(TEACHER_PATH)
    own = [
        row
        for row in candidates
        if row.group is student.group
        or (isinstance(path, str) and any(is_at(r.folder, Path(path)) for r in row.group.runs))
    ]
    return max(
        own or candidates,
        key=lambda row: (max(row.cells), bool(row.group.versions & student.group.versions)),
    )


# ---------------------------------------------------------------------- PCM and LCM


def _phased_against_consistency(board: Board) -> list[Finding]:
    """Every PCM student beside the LCM students at equal steps, of the same version if any."""
    phased = [r for r in board.rows if r.group.method == PHASED and not r.is_teacher]
    plain = [r for r in board.rows if r.group.method == CONSISTENCY and not r.is_teacher]
    found = []
    for row in phased:
        rivals = [r for r in plain if r.signature == row.signature and r.role == row.role]
        rivals = [r for r in rivals if r.group.versions & row.group.versions] or rivals
        for rival in rivals:
            for steps in sorted(row.cells.keys() & rival.cells.keys()):
                beside = f"LCM ({board.name_of(rival)}) at equal steps"
                cells = row.cells[steps], rival.cells[steps]
                found.append(_compare(board, row, steps, cells[0], beside, cells[1], "PCM"))
    return found


# ---------------------------------------------------------------------- one comparison


def _compare(
    board: Board, row: Row, steps: int, cell: Cell, beside: str, other: Cell, kind: str = ""
) -> Finding:
    """Says how one number stands beside another."""
    name = board.name_of(row)
    subject = f"{kind} ({name})" if kind else name
    subject = f"{subject} at {_steps(steps)}"
    group = row.group.position
    numbers = f"{_value(cell)} against {_value(other)}"
    if not (cell.finite and other.finite) or other.mean <= 0:
        return Finding(f"{subject} has no ratio to {beside}: {numbers}.", "unknown", group)
    ratio = cell.mean / other.mean
    verdict: Verdict = "better" if (ratio < 1) == board.lower else "worse"
    if f"{ratio:.2f}" == "1.00":
        verdict = "equal"
    said: str = "equal to two decimals" if verdict == "equal" else verdict
    if verdict != "equal" and _within_spread(cell, other):
        said += " on average, but within the spread over seeds"
    return Finding(
        f"{subject}: {ratio:.2f}x {beside}, {said} ({numbers}{_cost(cell, other)}).", verdict, group
    )


def _within_spread(cell: Cell, other: Cell) -> bool:
    """Whether two means are no further apart than their standard deviations together."""
    if cell.deviation is None or other.deviation is None:
        return False
    return abs(cell.mean - other.mean) <= cell.deviation + other.deviation


def _cost(cell: Cell, other: Cell) -> str:
    """How many network evaluations less, or more, a sample costs."""
    if cell.evaluations == other.evaluations or not cell.evaluations or not other.evaluations:
        return ""
    fewer = other.evaluations / cell.evaluations
    if fewer > 1:
        return f"; {fewer:.3g}x fewer network evaluations"
    return f"; {1 / fewer:.3g}x more network evaluations"


def _value(cell: Cell) -> str:
    if cell.deviation is None:
        return figure(cell.mean)
    return f"{figure(cell.mean)} ± {spread(cell.mean, cell.deviation)}"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


# ---------------------------------------------------------------------- on the page


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
        f'<li data-group="{f.group}"><span class="verdict {f.verdict}">{f.verdict}</span>'
        f"<span>{escape(f.text)}</span></li>"
        for f in found
    )
    return f'<ul class="findings">{items}</ul>'
