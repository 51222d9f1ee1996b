"""What the methods themselves warned of in training, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from callbacks.alarms import sentence
from scripts.report.data import Run
from scripts.report.groups import Group


def alarms_section(groups: Sequence[Group]) -> str:
    """A line for each alarm of each run; empty if there was none."""
    items = "".join(
        f'<li data-group="{group.position}"><span class="verdict worse">alarm</span>'
        f"<span>{escape(run.label)}: {escape(text)}</span></li>"
        for group in groups
        for run in group.runs
        for text in told(run)
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def told(run: Run) -> list[str]:
    """What was raised, each with what became of it."""
    found = []
    for number, line in enumerate(run.alarms):
        if line["state"] != "raised":
            continue
        ended = next((e for e in run.alarms[number + 1 :] if _ends(e, line)), None)
        last = "It was never back in its range."
        if ended is not None:
            last = f"It was back in its range at update {ended['update']:,}."
        found.append(f"{sentence(line).removeprefix('Alarm: ')} {last}")
    return found


def _ends(later: dict[str, Any], raised: dict[str, Any]) -> bool:
    same = all(later[name] == raised[name] for name in ("value", "below", "above"))
    return same and later["state"] == "ended"
