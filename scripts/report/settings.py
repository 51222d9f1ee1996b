"""How the runs' settings differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scripts.report.groups import OWN_TO_A_RUN, Group
from scripts.report.table import DASH, Cell, Column, Line, Table, to_html

MOST_KEYS = 80
MOST_CHARACTERS = 90


def settings_table(groups: Sequence[Group]) -> Table:
    """One row a group, one column a setting whose values are not the same in all of them."""
    known = [group for group in groups if group.first.config]
    keys = differing([group.first.config for group in known])
    keys = [key for key in keys if not key.startswith(OWN_TO_A_RUN)][:MOST_KEYS]
    columns = [Column(key, text=_is_text(key, known)) for key in keys]
    lines = [
        Line(
            group.label,
            [_cell(group.first.config, column) for column in columns],
            group=group.position,
        )
        for group in known
    ]
    return Table("settings", "Settings that differ", columns, lines)


def settings_section(groups: Sequence[Group], table: Table) -> str:
    """The table, or why there is none."""
    if len(table.lines) < 2:
        return '<p class="note">Fewer than two of these runs have a config.yaml.</p>'
    if not table.columns:
        return '<p class="note">All settings are the same.</p>'
    note = "Only what differs is shown, and of runs that differ only in their seed the first"
    if len(table.columns) == MOST_KEYS:
        note += f", and of that the first {MOST_KEYS} keys"
    missing = len(groups) - len(table.lines)
    if missing:
        note += f"; {missing} without a config.yaml left out"
    return f'{to_html(table)}<p class="note">{note}.</p>'


def differing(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all tables; a missing one is a value of its own."""
    keys = sorted({key for table in tables for key in table})
    return [
        key
        for key in keys
        if len({plain(table[key]) if key in table else None for table in tables}) > 1
    ]


def _is_text(key: str, groups: Sequence[Group]) -> bool:
    """Whether a column must be sorted as text: one of its values is no number."""
    values = [g.first.config[key] for g in groups if g.first.config.get(key) is not None]
    return any(isinstance(value, bool) or not isinstance(value, int | float) for value in values)


def _cell(config: dict[str, Any], column: Column) -> Cell:
    if column.name not in config:
        return Cell(DASH)
    value = config[column.name]
    text = plain(value)
    text = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return Cell(text, None if column.text or value is None else float(value))


def plain(value: Any) -> str:
    """A value as YAML's reader would write it, more or less."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
