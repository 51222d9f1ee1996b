"""Tables as files for papers, spreadsheets and notes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from scripts.report.table import DASH, Cell, Column, Line, Table

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    DASH: "--",
    "±": r"$\pm$",
    "\u2009": r"\,",
}


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Writes every table as CSV, Markdown and LaTeX; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for end, made in (
            ("csv", as_csv(table)),
            ("md", as_markdown(table)),
            ("tex", as_latex(table)),
        ):
            path = folder / f"{table.name}.{end}"
            path.write_text(made, encoding="utf-8")
            written.append(path)
    return written


def as_csv(table: Table) -> str:
    """Numbers in full precision; the seeds of a row follow it, and ± has columns of its own."""
    lines = table.lines_in_order()
    spread = [
        any(line.cells[i].deviation is not None for line in lines)
        for i in range(len(table.columns))
    ]
    heads = [table.first, "remark", "protocol"]
    for column, deviates in zip(table.columns, spread, strict=True):
        heads += [column.name, f"{column.name} ±"] if deviates else [column.name]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for line in lines:
        row = [line.name, line.small, line.mark]
        for cell, column, deviates in zip(line.cells, table.columns, spread, strict=True):
            row.append(_plain_value(cell, column))
            if deviates:
                row.append("" if cell.deviation is None else repr(cell.deviation))
        writer.writerow(row)
    return buffer.getvalue()


def _plain_value(cell: Cell, column: Column) -> str:
    if column.text:
        return "" if cell.text == DASH else cell.text
    return "" if cell.value is None else f"{cell.value!r}".removesuffix(".0")


def as_markdown(table: Table) -> str:
    """As read on the page, the best in bold; seeds are left to the CSV."""
    lines = [f"| {' | '.join(_bar(h) for h in _heads(table))} |"]
    aligned = [":--", *(":--" if column.text else "--:" for column in table.columns)]
    lines.append(f"| {' | '.join(aligned)} |")
    for line in _top(table):
        cells = [f"**{c.text}**" if c.best else _bar(c.text) for c in line.cells]
        cells = [
            f"{t} ± {c.spread}" if c.spread else t for t, c in zip(cells, line.cells, strict=True)
        ]
        lines.append(f"| {' | '.join([_bar(_name(line)), *cells])} |")
    return "\n".join(lines) + "\n"


def _bar(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_latex(table: Table) -> str:
    """A tabular in the manner of booktabs; seeds are left to the CSV."""
    aligned = "l" + "".join("l" if column.text else "r" for column in table.columns)
    lines = [
        f"% {table.title}",
        f"\\begin{{tabular}}{{{aligned}}}",
        "\\toprule",
        " & ".join(_tex(head) for head in _heads(table)) + " \\\\",
        "\\midrule",
    ]
    for line in _top(table):
        cells = [f"\\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in line.cells]
        cells = [
            f"{text} $\\pm$ {_tex(c.spread)}" if c.spread else text
            for text, c in zip(cells, line.cells, strict=True)
        ]
        lines.append(" & ".join([_tex(_name(line)), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def _heads(table: Table) -> list[str]:
    return [table.first, *(column.name for column in table.columns)]


def _top(table: Table) -> list[Line]:
    return sorted(table.lines, key=lambda line: not line.teacher)


def _name(line: Line) -> str:
    """A row's name, with the letter of what it must not be compared with."""
    return f"{line.name} ({line.mark})" if line.mark else line.name
