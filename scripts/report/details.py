"""The small print of a report: protocols, environment, and how the runs' settings differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from scripts.report.boards import Board
from scripts.report.data import Run

MOST_KEYS = 80
MOST_RUNS = 12
MOST_CHARACTERS = 90
OWN_TO_A_RUN = ("run.", "ckpt_path")
"""Settings that say where a run lies, not what it does."""


def details_section(runs: Sequence[Run], boards: Sequence[Board]) -> str:
    """Collapsed parts, one for each kind of small print."""
    protocols = "".join(_protocol(board) for board in boards)
    parts = (
        ("Protocol of the measurements", protocols or "<p>Nothing was measured.</p>"),
        ("Environment", _environment(runs)),
        ("Settings that differ", _settings(runs)),
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
        text = "\n".join(f"{k}: {_plain(v)}" for k, v in sorted(conditions.items()))
        parts.append(f"<p>{escape(names)}</p><pre>{escape(text)}</pre>")
    return "".join(parts)


def _environment(runs: Sequence[Run]) -> str:
    keys = sorted({key for run in runs for key in run.environment})
    if not keys:
        return "<p>No run recorded its environment.</p>"
    same = [k for k in keys if len(_values(runs, lambda run: run.environment, k)) == 1]
    text = "\n".join(f"{k}: {_plain(runs[0].environment[k])}" for k in same)
    parts = [f"<p>The same for every run:</p><pre>{escape(text)}</pre>"] if same else []
    differing = [k for k in keys if k not in same]
    if differing:
        parts.append(_differences(runs, differing, lambda run: run.environment))
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    """Keys of the configurations whose values are not the same in every run."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return "<p>Fewer than two of these runs have a config.yaml.</p>"
    keys = sorted({key for run in known for key in run.config})
    differing = [
        key
        for key in keys
        if not key.startswith(OWN_TO_A_RUN) and len(_values(known, lambda run: run.config, key)) > 1
    ]
    if not differing:
        return "<p>All settings are the same.</p>"
    return _differences(known, differing, lambda run: run.config)


def _values(
    runs: Sequence[Run], table: Callable[[Run], dict[str, Any]], key: str
) -> set[str | None]:
    """The different values of a key, None where it is missing."""
    return {_plain(table(run)[key]) if key in table(run) else None for run in runs}


def _differences(
    runs: Sequence[Run], keys: Sequence[str], table: Callable[[Run], dict[str, Any]]
) -> str:
    """A table of keys by runs; what is left out is said."""
    shown_runs, shown_keys = runs[:MOST_RUNS], keys[:MOST_KEYS]
    heads = "".join(f"<th>{escape(run.label)}</th>" for run in shown_runs)
    rows = "".join(
        f"<tr><th><code>{escape(key)}</code></th>"
        + "".join(f"<td>{escape(_cut(table(run), key))}</td>" for run in shown_runs)
        + "</tr>"
        for key in shown_keys
    )
    left = []
    if len(runs) > MOST_RUNS:
        left.append(f"{len(runs) - MOST_RUNS} runs")
    if len(keys) > MOST_KEYS:
        left.append(f"{len(keys) - MOST_KEYS} keys")
    note = f'<p class="note">Not shown: {" and ".join(left)} more.</p>' if left else ""
    return (
        f'<div class="scroll"><table class="plain"><thead><tr><th>key</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _cut(table: dict[str, Any], key: str) -> str:
    if key not in table:
        return "–"
    text = _plain(table[key])
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _folders(runs: Sequence[Run]) -> str:
    items = "".join(
        f"<li>{escape(run.label)}: <code>{escape(str(run.folder))}</code></li>" for run in runs
    )
    return f"<ul>{items}</ul>"
