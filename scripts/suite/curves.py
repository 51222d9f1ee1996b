"""A suite's numbers against a setting that its grid goes through: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.loggers import read_metrics
from scripts.suite.line_charts import Points, line_charts
from scripts.suite.plan import Plan
from scripts.suite.states import State
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
        quantities: by name, the values of each line at each value of the setting, one a seed.
    """

    setting: str
    name: str
    quantities: dict[str, Rows] = field(default_factory=dict)


def write_curves(plan: Plan) -> list[Path]:
    """Writes ``against_<setting>.md`` and ``.png`` for each number that a suite's grids go through.

    Returns:
        The files; none if no grid has a number, or too little is done.
    """
    done: dict[Variant, list[Path]] = {}
    for cell in plan.cells:
        if cell.standing.state is State.DONE:
            done.setdefault(cell.variant, []).append(cell.folder)
    files: list[Path] = []
    for setting in settings_of(list(done)):
        found = curves(done, setting)
        text, image = (plan.home / f"against_{found.name}.{end}" for end in ("md", "png"))
        text.write_text(table(found), encoding="utf-8")
        line_charts(charted(found.quantities), found.name).save(image)
        files += [text, image]
    return files


def settings_of(variants: Sequence[Variant]) -> list[str]:
    """Keys of grids that have different numbers in some variants."""
    values: dict[str, set[float]] = {}
    for variant in variants:
        for key in leading_keys(variant.entry):
            value = variant.point[key]
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def curves(runs: Mapping[Variant, Sequence[Path]], setting: str) -> Curves:
    """Numbers of all runs whose grid has the setting.

    Args:
        runs: the folders of each variant, one a training seed.
        setting: a key that grids go through.
    """
    keys = {key for variant in runs for key in leading_keys(variant.entry)}
    found = Curves(setting, short_key(setting, keys))
    for variant, folders in runs.items():
        if setting not in leading_keys(variant.entry):
            continue
        line = label_at(variant.entry, variant.point, without=setting)
        for folder in folders:
            for (quantity, row), value in quantities_of(folder, line).items():
                lines = found.quantities.setdefault(quantity, {})
                lines.setdefault(row, {}).setdefault(variant.point[setting], []).append(value)
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
    """Markdown tables, one a quantity, with the setting's values as columns."""
    lines = [cells for rows in found.quantities.values() for cells in rows.values()]
    seeds = max(len(values) for cells in lines for values in cells.values())
    spread = f", mean ± standard deviation over up to {seeds} training seeds" if seeds > 1 else ""
    heads = f" against `{found.name}`{spread}"
    parts = (f"`{name}`{heads}\n\n{markdown(rows)}" for name, rows in found.quantities.items())
    return "\n".join(parts)


def charted(quantities: Mapping[str, Rows]) -> dict[str, dict[str, Points]]:
    """The same as points to draw: place, and the values there."""
    return {
        name: {line: sorted(cells.items()) for line, cells in rows.items()}
        for name, rows in quantities.items()
    }
