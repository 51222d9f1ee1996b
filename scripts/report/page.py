"""The page as a whole: its parts in their order, and the data its scripts work on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from fewstep import __version__
from scripts.report.alarms import alarms_section
from scripts.report.boards import Board, boards
from scripts.report.charts import Chart
from scripts.report.cost import cost_section, cost_table
from scripts.report.data import Material
from scripts.report.details import details_section
from scripts.report.export import LATEX
from scripts.report.findings import findings_section
from scripts.report.groups import Group, grouped
from scripts.report.leaderboard import leaderboard, leaderboard_table, overview_tables
from scripts.report.pictures import pictures_section
from scripts.report.plots import curves_section, quality_section
from scripts.report.settings import plain, settings_section, settings_table
from scripts.report.table import Table, to_html

MOST_NOTES = 6
SCRIPTS = ("state.js", "tables.js", "charts.js", "pictures.js", "runs.js")


@dataclass(frozen=True)
class Report:
    """What a page is made of.

    Attributes:
        leaderboards: one a metric, in the order of the boards.
        overviews: all metrics, by step count.
        settings: what differs between the runs' configurations.
    """

    material: Material
    groups: list[Group]
    boards: list[Board]
    leaderboards: list[Table]
    overviews: dict[int, Table]
    cost: Table
    settings: Table

    @property
    def tables(self) -> list[Table]:
        """All tables that hold something."""
        found = [*self.leaderboards, *self.overviews.values(), self.cost, self.settings]
        return [table for table in found if table.columns and table.lines]


def compile_report(material: Material) -> Report:
    """Groups runs and makes the tables."""
    groups = grouped(material.runs)
    found = boards(groups)
    return Report(
        material,
        groups,
        found,
        [leaderboard_table(board) for board in found],
        overview_tables(found),
        cost_table(groups),
        settings_table(groups),
    )


def render(report: Report, title: str, budget: int) -> str:
    """The whole page as HTML, with at most ``budget`` bytes of pictures."""
    charts: list[Chart] = []
    notes = list(report.material.notes)
    runs = report.material.runs
    pictures, images = pictures_section(report.groups, report.boards, notes, budget)
    sections = (
        ("leaderboard", "Leaderboard", _leaderboards(report)),
        ("overview", "All metrics", _overviews(report)),
        ("findings", "What the numbers say", _findings(report.boards)),
        ("alarms", "Alarms in training", alarms_section(report.groups)),
        ("quality", "Quality against cost", _quality(report.boards, charts)),
        ("samples", "Samples", pictures),
        ("curves", "Training curves", curves_section(report.groups, charts)),
        ("cost", "Training cost", cost_section(report.cost)),
        ("settings", "Settings that differ", settings_section(report.groups, report.settings)),
        ("details", "Protocol and environment", details_section(runs, report.boards)),
    )
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>'
        for anchor, heading, content in shown
    )
    data = "".join(
        f'<script type="text/plain" id="picture-{key}">{url}</script>'
        for key, url in images.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_file('page.css')}</style></head><body>"
        f"{_header(report, title)}{_missing(notes)}"
        f'<div class="layout"><div class="side"><nav aria-label="Sections">{links}</nav>'
        f"{_panel(report)}</div><main>{body}</main></div>{_DIALOG}"
        f'<script type="application/json" id="data">{_json(_data(report, charts))}</script>'
        f"<script>{''.join(_file(name) for name in SCRIPTS)}</script>{data}</body></html>"
    )


_DIALOG = (
    '<dialog id="zoomed"><form method="dialog"><b></b><button>Close</button></form>'
    '<img alt=""></dialog><noscript><p class="note">Charts, pictures, sorting and export need '
    "JavaScript; the tables do not.</p><style>main [hidden][hidden] { display: block !important; } "
    "tr.member[hidden][hidden] { display: table-row !important; }</style></noscript>"
)


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _data(report: Report, charts: Sequence[Chart]) -> dict[str, Any]:
    """What the page's scripts know."""
    settings = [column.name for column in report.settings.columns]
    return {
        "groups": [
            {"teacher": group.is_teacher, "search": _searched(group, settings)}
            for group in report.groups
        ],
        "ranks": {board.metric: _ranked(board) for board in report.boards},
        "charts": [chart.data() for chart in charts],
        "latex": LATEX,
    }


def _searched(group: Group, settings: Sequence[str]) -> str:
    """What the filter looks through: names, and settings such as ``num_phases=4``."""
    words = [group.label, group.method, *(run.label for run in group.runs)]
    for run in group.runs:
        words += [f"{key}={plain(run.config[key])}" for key in settings if key in run.config]
    return "\n".join(words).lower()


def _ranked(board: Board) -> list[int]:
    """Groups by their best value at any step count, among those that may be compared."""
    best: dict[int, float] = {}
    for row in board.rows:
        for cell in row.cells.values():
            if row.signature == board.common and cell.finite:
                value = cell.mean if board.lower else -cell.mean
                place = row.group.position
                best[place] = min(best.get(place, value), value)
    return sorted(best, key=lambda group: best[group])


# ---------------------------------------------------------------------- head and side


def _header(report: Report, title: str) -> str:
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(_summary(report))}</p>'
        f'<p class="note">Made {escape(made)} by fewstep {escape(__version__)}.</p></header>'
    )


def _summary(report: Report) -> str:
    """The page in one sentence."""
    runs, groups = report.material.runs, report.groups
    what = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    if len(groups) != len(runs):
        what += f", {len(groups)} when those that differ only in their seed are taken together"
    experiments = len({run.name for run in runs})
    if experiments not in (len(runs), len(groups)):
        what += f", of {experiments} experiment{'s' * (experiments != 1)}"
    metrics = [board.metric for board in report.boards]
    if not metrics:
        return f"{what}, without any measurement."
    more = f" and {len(metrics) - 3} more metrics" if len(metrics) > 4 else ""
    first = metrics[:3] if more else metrics
    return f"{what}, measured by {(', ' if more else ' and ').join(first)}{more}."


def _panel(report: Report) -> str:
    """The list of runs: legend, filter and choice in one."""
    items = "".join(
        f'<li data-group="{i}"><label><input type="checkbox" checked>'
        f'<i class="key" data-key="{i}"></i><span>{escape(group.label)}'
        f"<small>{escape(group.method)}</small></span></label></li>"
        for i, group in enumerate(report.groups)
    )
    best = '<button type="button" id="best">Best 8</button>' if len(report.groups) > 8 else ""
    return (
        '<details class="panel" open><summary>Runs<output id="shown"></output></summary>'
        '<label for="filter">Filter</label>'
        '<input type="search" id="filter" placeholder="name, method, setting=value">'
        '<div class="row"><button type="button" id="all">All</button>'
        f'<button type="button" id="none">None</button>{best}</div><ul>{items}</ul></details>'
    )


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


# ---------------------------------------------------------------------- sections by metric


def _picked(kind: str, label: str, parts: dict[str, str], chosen: str = "") -> str:
    """Parts of which one is seen at a time, and the list to choose it from."""
    if not any(parts.values()):
        return ""
    chosen = chosen or next(iter(parts))
    content = "".join(
        f'<div data-{kind}="{escape(name)}"{" hidden" * (name != chosen)}>{part}</div>'
        for name, part in parts.items()
    )
    if len(parts) < 2:
        return content
    options = "".join(
        f"<option{' selected' * (name == chosen)}>{escape(name)}</option>" for name in parts
    )
    return f'<label class="pick">{label} <select class="{kind}">{options}</select></label>{content}'


def _leaderboards(report: Report) -> str:
    if not report.boards:
        return '<p class="note">No run holds a measurement; `fewstep evaluate` makes some.</p>'
    pairs = zip(report.boards, report.leaderboards, strict=True)
    return _picked("metric", "Metric", {b.metric: leaderboard(b, table) for b, table in pairs})


def _overviews(report: Report) -> str:
    note = (
        '<p class="note">Each metric under the protocol most of its measurements share; numbers '
        "measured otherwise are left out here.</p>"
    )
    parts = {str(steps): to_html(table) + note for steps, table in report.overviews.items()}
    most = max(report.overviews.items(), key=lambda item: len(item[1].lines), default=(0,))
    return _picked("count", "Sampling steps", parts, str(most[0]))


def _quality(found: Sequence[Board], charts: list[Chart]) -> str:
    return _picked("metric", "Metric", {b.metric: quality_section(b, charts) for b in found})


def _findings(found: Sequence[Board]) -> str:
    content = _picked("metric", "Metric", {b.metric: findings_section(b) for b in found})
    cells = [cell for board in found for row in board.rows for cell in row.cells.values()]
    if content and any(len(cell.values) == 1 for cell in cells):
        content += (
            '<p class="note">A number without ± was measured once: nothing here tells how far '
            "another seed would move it, so small differences may be chance.</p>"
        )
    return content
