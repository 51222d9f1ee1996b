"""A suite's numbers against a setting that its grid goes through: a table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from scripts.line_charts import Lines, line_charts
from scripts.loggers import read_metrics
from scripts.suite.outcomes import Outcome, left_out, outcomes
from scripts.suite.plan import Plan
from scripts.suite.tables import Rows, markdown, numbers_of
from scripts.suite.variants import Variant, label_at, leading_keys, short_key

# What a run logs that its results do not hold; its last value counts.
LOGGED = ("val/", "sensitivity/")


@dataclass
class Curves:
    """Numbers of runs that differ in a setting, and in what else their labels say.

    Attributes:
        setting: the setting's dotted key.
        name: the same, as short as labels have it.
        updates: of the runs at each value of the setting, if it has one number of them and not all
            values have the same.
        quantities: by name, the values of each line at each value of the setting, one a seed.
        shortfalls: by line and value of the setting, of how many runs that is, if not of all.
    """

    setting: str
    name: str
    updates: dict[float, int] = field(default_factory=dict)
    quantities: dict[str, Rows] = field(default_factory=dict)
    shortfalls: dict[str, dict[float, str]] = field(default_factory=dict)


def write_curves(plan: Plan) -> list[Path]:
    """Writes ``against_<setting>.md`` and ``.png`` for each number that a suite's grids go through.

    Returns:
        The files; none if no grid has a number, or too little is done.
    """
    found = outcomes(plan)
    tried = {variant: outcome for variant, outcome in found.items() if outcome.tried}
    files: list[Path] = []
    for setting in settings_of(variant for variant, outcome in tried.items() if outcome.done):
        drawn = curves(tried, setting)
        text, image = (plan.home / f"against_{drawn.name}.{end}" for end in ("md", "png"))
        parts = filter(None, [table(drawn), left_out(found)])
        text.write_text("\n".join(parts), encoding="utf-8")
        picture(drawn).save(image)
        files += [text, image]
    return files


def settings_of(variants: Iterable[Variant]) -> list[str]:
    """Keys of grids that have different numbers in some variants."""
    values: dict[str, set[float]] = {}
    for variant in variants:
        for key in leading_keys(variant.entry):
            value = variant.point[key]
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def curves(runs: Mapping[Variant, Outcome], setting: str) -> Curves:
    """Numbers of all runs whose grid has the setting.

    Args:
        runs: what became of each variant.
        setting: a key that grids go through.
    """
    keys = {key for variant in runs for key in leading_keys(variant.entry)}
    found = Curves(setting, short_key(setting, keys))
    updates: dict[float, set[int]] = {}
    for variant, outcome in runs.items():
        if setting not in leading_keys(variant.entry):
            continue
        at = variant.point[setting]
        line = label_at(variant.entry, variant.point, without=setting)
        updates.setdefault(at, set()).add(variant.config["trainer"]["max_steps"])
        if outcome.shortfall:
            found.shortfalls.setdefault(line, {})[at] = outcome.shortfall
        for folder in outcome.done:
            for (quantity, row), value in quantities_of(folder, line).items():
                lines = found.quantities.setdefault(quantity, {})
                lines.setdefault(row, {}).setdefault(at, []).append(value)
    if all(len(own) == 1 for own in updates.values()) and len(set.union(*updates.values())) > 1:
        found.updates = {at: own.pop() for at, own in sorted(updates.items())}
    return found


def quantities_of(folder: Path, line: str) -> dict[tuple[str, str], float]:
    """A run's numbers by quantity and line: what was measured, and the last of what was logged."""
    measured = numbers_of(folder, line)
    found = {
        (f"{metric} at {steps} steps", row): value
        for (metric, row, steps), value in measured.items()
    }
    for name, points in read_metrics(folder).items():
        if name.startswith(LOGGED) and points:
            found[name, line] = points[-1][1]
    return found


def table(found: Curves) -> str:
    """Markdown tables, one a quantity, with the setting's values as columns.

    Where they differ, a column's head names the updates too. A line of which no run is done has a
    row all the same.
    """
    lines = [cells for rows in found.quantities.values() for cells in rows.values()]
    seeds = max(len(values) for cells in lines for values in cells.values())
    spread = f", mean ± standard deviation over up to {seeds} training seeds" if seeds > 1 else ""
    about = f" against `{found.name}`{spread}"
    heads = {at: f"{at} ({count:,} updates)" for at, count in found.updates.items()}
    parts = []
    for name, rows in found.quantities.items():
        empty: Rows = {line: {} for line in found.shortfalls if not _rows_of(line, rows)}
        notes = {row: own for line, own in found.shortfalls.items() for row in _rows_of(line, rows)}
        notes |= {line: found.shortfalls[line] for line in empty}
        parts.append(f"`{name}`{about}\n\n{markdown(rows | empty, heads, notes)}")
    return "\n".join(parts)


def _rows_of(line: str, rows: Iterable[str]) -> list[str]:
    """A line's row, or one a role."""
    return [row for row in rows if row == line or row.startswith(f"{line} (")]


def picture(found: Curves) -> Image.Image:
    """One chart a quantity; what its points are without stands below."""
    charts: list[dict[str, Lines]] = [
        {name: {line: sorted(cells.items()) for line, cells in rows.items()}}
        for name, rows in found.quantities.items()
    ]
    ticks = {at: f"{at}\n{count:,} updates" for at, count in found.updates.items()}
    notes = [
        f"{line} at {at}: {shortfall}"
        for line, own in found.shortfalls.items()
        for at, shortfall in own.items()
    ]
    return line_charts(charts, f"across: {found.name}", ticks, notes)
