"""The small print of a report: protocols, environment and folders."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from scripts.report.boards import Board
from scripts.report.data import Run
from scripts.report.settings import differing, plain


def details_section(runs: Sequence[Run], boards: Sequence[Board]) -> str:
    """Collapsed parts, one for each kind of small print."""
    protocols = "".join(_protocol(board) for board in boards)
    parts = (
        ("Protocol of the measurements", protocols or "<p>Nothing was measured.</p>"),
        ("Environment", _environment(runs)),
        ("Folders", _folders(runs)),
    )
    return "".join(
        f"<details><summary>{title}</summary>{content}</details>" for title, content in parts
    )


def _protocol(board: Board) -> str:
    """The conditions of every kind of measurement, the most common first."""
    kinds = {row.signature: row.conditions for row in board.rows}
    kinds = {board.common: kinds[board.common], **kinds}
    parts = [f"<h4>{escape(board.metric)}</h4>"]
    for signature, conditions in kinds.items():
        rows = [row for row in board.rows if row.signature == signature]
        names = ", ".join(dict.fromkeys(board.name_of(row) for row in rows))
        text = "\n".join(f"{k}: {plain(v)}" for k, v in sorted(conditions.items()))
        parts.append(f"<p>{escape(names)}</p><pre>{escape(text)}</pre>")
    return "".join(parts)


def _environment(runs: Sequence[Run]) -> str:
    keys = sorted({key for run in runs for key in run.environment})
    if not keys:
        return "<p>No run recorded its environment.</p>"
    odd = differing([run.environment for run in runs])
    text = "\n".join(f"{k}: {plain(runs[0].environment[k])}" for k in keys if k not in odd)
    parts = [f"<p>The same for every run:</p><pre>{escape(text)}</pre>"] if text else []
    for key in odd:
        by_value: dict[str, list[str]] = {}
        for run in runs:
            value = plain(run.environment[key]) if key in run.environment else "not recorded"
            by_value.setdefault(value, []).append(run.label)
        items = "".join(
            f"<li><code>{escape(value)}</code>: {escape(', '.join(labels))}</li>"
            for value, labels in by_value.items()
        )
        parts.append(f"<p>{escape(key)} differs:</p><ul>{items}</ul>")
    return "".join(parts)


def _folders(runs: Sequence[Run]) -> str:
    items = "".join(
        f"<li>{escape(run.label)}: <code>{escape(str(run.folder))}</code></li>" for run in runs
    )
    return f"<ul>{items}</ul>"
