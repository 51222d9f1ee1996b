"""The page as a whole: its parts in their order."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape

from fewstep import __version__
from scripts.report.boards import Board, boards
from scripts.report.data import Material
from scripts.report.details import details_section
from scripts.report.pictures import pictures_section
from scripts.report.plots import curves_section, quality_section
from scripts.report.style import SCRIPT, STYLE
from scripts.report.tables import cost_table, findings_section, leaderboard

MOST_NOTES = 6


def render(material: Material, title: str) -> str:
    """The whole page as HTML."""
    runs, found = material.runs, boards(material.runs)
    notes = list(material.notes)
    pictures = pictures_section(runs, found, notes)
    sections = (
        ("leaderboard", "Leaderboard", _leaderboards(found)),
        ("findings", "What the numbers say", _findings(found)),
        ("quality", "Quality against cost", "".join(quality_section(b) for b in found)),
        ("curves", "Training curves", curves_section(runs)),
        ("cost", "Training cost", cost_table(runs)),
        ("samples", "Samples", pictures),
        ("details", "Protocol and environment", details_section(runs, found)),
    )
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>'
        for anchor, heading, content in shown
    )
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(_summary(material, found))}</p>'
        f'<p class="note">Made {escape(made)} by fewstep {escape(__version__)}.</p>'
        f"<nav>{links}</nav></header>{_missing(notes)}{body}<script>{SCRIPT}</script></body></html>"
    )


def _summary(material: Material, found: Sequence[Board]) -> str:
    """The page in one sentence."""
    count = len(material.runs)
    experiments = len({run.name for run in material.runs})
    what = f"{count} run{'s' * (count != 1)}"
    if experiments != count:
        what += f" of {experiments} experiment{'s' * (experiments != 1)}"
    if not found:
        return f"{what}, without any measurement."
    return f"{what}, measured by {' and '.join(board.metric for board in found)}."


def _leaderboards(found: Sequence[Board]) -> str:
    if not found:
        return '<p class="note">No run holds a measurement; `fewstep evaluate` makes some.</p>'
    return "".join(leaderboard(board, i) for i, board in enumerate(found))


def _findings(found: Sequence[Board]) -> str:
    content = "".join(findings_section(board) for board in found)
    cells = [cell for board in found for row in board.rows for cell in row.cells.values()]
    if content and any(len(cell.values) == 1 for cell in cells):
        content += (
            '<p class="note">A number without ± was measured once: nothing here tells how far '
            "another seed would move it, so small differences may be chance.</p>"
        )
    return content


def _missing(notes: Sequence[str]) -> str:
    """What could not be read, where nobody can overlook it."""
    if not notes:
        return ""
    items = [f"<li>{escape(note)}</li>" for note in notes]
    more = ""
    if items[MOST_NOTES:]:
        more = f"<details><summary>{len(items) - MOST_NOTES} more</summary>"
        more += f"<ul>{''.join(items[MOST_NOTES:])}</ul></details>"
    return (
        '<aside class="missing"><b>Missing or damaged</b>'
        f"<ul>{''.join(items[:MOST_NOTES])}</ul>{more}</aside>"
    )
