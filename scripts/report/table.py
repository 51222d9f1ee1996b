"""One model of a table, from which the page and the exported files are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

DASH = "–"

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: what is read.
        value: what it is sorted by and exported as; None for text, and for what is missing.
        spread: what stands behind the ±, as it is read.
        deviation: the same in full precision.
        small: a remark below.
        best: whether it wins its column.
    """

    text: str
    value: float | None = None
    spread: str = ""
    deviation: float | None = None
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        name: its first cell.
        small: a remark below the name.
        group: the position of the group of runs it is about.
        mark: a footnote's letter, for rows that must not be compared with the others.
        members: rows that are folded away below it.
    """

    name: str
    cells: Sequence[Cell]
    small: str = ""
    group: int = -1
    mark: str = ""
    teacher: bool = False
    members: Sequence[Line] = ()


@dataclass(frozen=True)
class Column:
    """A column's head; ``better`` says which end of it is looked for first."""

    name: str
    better: Better = ""
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its exported files; also what footnotes are anchored by.
        first: the head of the rows' names.
        counted: what a row's members are, such as "seeds".
    """

    name: str
    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    first: str = "run"
    counted: str = "seeds"

    def lines_in_order(self) -> list[Line]:
        """Teachers, then the others; members follow the row they belong to."""
        top = sorted(self.lines, key=lambda line: not line.teacher)
        return [shown for line in top for shown in (line, *line.members)]


def to_html(table: Table) -> str:
    """The table, scrolling within itself, with the place where the page puts its export buttons."""
    heads = "".join(
        _head(column.name, column.text, column.better)
        for column in (Column(table.first, text=True), *table.columns)
    )
    bodies = "".join(
        f'<tbody class="{kind}">{"".join(_line(table, line) for line in lines)}</tbody>'
        for kind, lines in (
            ("teachers", [line for line in table.lines if line.teacher]),
            ("students", [line for line in table.lines if not line.teacher]),
        )
        if lines
    )
    title = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="sortable" data-name="{escape(table.name)}" data-title="{title}"><thead>'
        f"<tr>{heads}</tr></thead>{bodies}</table></div>"
    )


def _head(name: str, text: bool, better: Better) -> str:
    kind = ' class="text"' if text else ""
    direction = f' data-better="{better}"' if better else ""
    return f'<th scope="col"{kind}{direction}><button type="button">{escape(name)}</button></th>'


def _line(table: Table, line: Line) -> str:
    mark = f' <sup><a href="#{table.name}-{line.mark}">{line.mark}</a></sup>' if line.mark else ""
    small = f"<small>{escape(line.small)}</small>" if line.small else ""
    if line.members:
        count = f"{len(line.members)} {table.counted}"
        small += f'<button type="button" class="fold" aria-expanded="false">{count}</button>'
    key = f'<i class="key" data-key="{line.group}"></i>' if line.group >= 0 else ""
    cells = _cells(line, table)
    odd = ' class="odd"' if line.mark else ""
    row = (
        f'<tr{odd} data-group="{line.group}"><th scope="row">{key}{escape(line.name)}{mark}'
        f"{small}</th>{cells}</tr>"
    )
    return row + "".join(_member(member, line, table) for member in line.members)


def _member(member: Line, line: Line, table: Table) -> str:
    small = f"<small>{escape(member.small)}</small>" if member.small else ""
    return (
        f'<tr class="member" data-group="{line.group}" hidden>'
        f'<th scope="row">{escape(member.name)}{small}</th>{_cells(member, table)}</tr>'
    )


def _cells(line: Line, table: Table) -> str:
    return "".join(_cell(*pair) for pair in zip(line.cells, table.columns, strict=True))


def _cell(cell: Cell, column: Column) -> str:
    if column.text:
        return f"<td>{escape(cell.text)}</td>"
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    spread = f" ± {cell.spread}" if cell.spread else ""
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    value = "" if cell.value is None else repr(cell.value)
    deviation = "" if cell.deviation is None else f' data-deviation="{cell.deviation!r}"'
    return f'<td class="number" data-value="{value}"{deviation}>{text}{spread}{small}</td>'
