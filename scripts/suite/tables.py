"""Tables of runs' numbers, means and deviations over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.results import FILE_NAME, read_results

Rows = dict[str, dict[float, list[float]]]


def numbers_of(folder: Path, label: str) -> dict[tuple[str, str, int], float]:
    """One run's numbers by metric, row and steps, each the mean over the seeds of its noise.

    Of measurements with different numbers of samples those with the most count.
    """
    entries: list[dict[str, Any]] = read_results(folder / FILE_NAME)["measurements"]
    roles = dict.fromkeys(entry["role"] for entry in entries)
    most = max((entry["num_samples"] for entry in entries), default=0)
    values: dict[tuple[str, str, int], list[float]] = {}
    for entry in entries:
        if entry["num_samples"] == most:
            row = f"{label} ({entry['role']})" if len(roles) > 1 else label
            key = (entry["metric"], row, entry["num_steps"])
            values.setdefault(key, []).append(float(entry["value"]))
    return {key: statistics.fmean(found) for key, found in values.items()}


def markdown(
    rows: Rows,
    heads: Mapping[float, str] | None = None,
    notes: Mapping[str, Mapping[float, str]] | None = None,
) -> str:
    """A Markdown table of values by label and column, such as the number of steps.

    Args:
        heads: what stands above a column, if not its number.
        notes: what stands behind a cell, by label and column.
    """
    heads, notes = heads or {}, notes or {}
    named = [*rows.values(), *notes.values(), heads]
    columns = sorted({column for cells in named for column in cells})
    lines = [
        "| run | " + " | ".join(heads.get(column, str(column)) for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, cells in rows.items():
        own = notes.get(label, {})
        shown = (cell(cells.get(c)) + (f" ({own[c]})" if own.get(c) else "") for c in columns)
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float] | None) -> str:
    """Mean and standard deviation of some values."""
    if not values:
        return "–"
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
