"""Leaderboards: numbers side by side, and which of them may be compared."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scripts.report.data import Run, flatten
from scripts.report.groups import Group

TEACHER_ROLE = "teacher"

IMPORTANT = (
    "fid",
    "fvd",
    "frechet_",
    "kid",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip_score",
    "sliced_wasserstein",
    "frame_fid",
    "motion_",
    "consistency_",
)
"""Beginnings of metrics' names, in the order a reader wants to see them."""


@dataclass(eq=False)
class Cell:
    """What a group and role scored at one step count.

    Attributes:
        by_run: values over the seeds of the sampling noise, by the run's position.
    """

    evaluations: int
    by_run: dict[int, list[float]] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """All values there are."""
        return [value for values in self.by_run.values() for value in values]

    @property
    def mean(self) -> float:
        """Mean over runs of their means over the sampling noise."""
        return statistics.fmean(statistics.fmean(values) for values in self.by_run.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over runs, or over the noise of a single run."""
        if not self.finite:
            return None
        spread = [statistics.fmean(values) for values in self.by_run.values()]
        spread = spread if len(spread) > 1 else self.values
        return statistics.stdev(spread) if len(spread) > 1 else None

    @property
    def finite(self) -> bool:
        """Whether every value is a number."""
        return all(math.isfinite(v) for v in self.values)


@dataclass(eq=False)
class Row:
    """One group and role under one protocol.

    Attributes:
        conditions: the protocol with the number of samples, flat; equal for comparable numbers.
        cells: by sampling step count.
    """

    group: Group
    role: str
    conditions: dict[str, Any]
    cells: dict[int, Cell] = field(default_factory=dict)

    @cached_property
    def signature(self) -> str:
        """The conditions as one string; two rows with the same one may be compared."""
        return json.dumps(self.conditions, sort_keys=True, default=str)

    @property
    def is_teacher(self) -> bool:
        """Whether this is what students are measured against."""
        return self.role == TEACHER_ROLE or self.group.is_teacher

    @property
    def runs(self) -> list[Run]:
        """The group's runs that were measured."""
        return [
            run
            for run in self.group.runs
            if any(run.position in cell.by_run for cell in self.cells.values())
        ]

    def of_run(self, run: Run) -> dict[int, Cell]:
        """The cells of one of the group's runs."""
        return {
            steps: Cell(cell.evaluations, {run.position: cell.by_run[run.position]})
            for steps, cell in self.cells.items()
            if run.position in cell.by_run
        }


@dataclass
class Board:
    """All rows of one metric, teachers first.

    Attributes:
        common: the signature most measurements share.
        lower: whether small values are good.
    """

    metric: str
    rows: list[Row]
    common: str
    lower: bool = True

    @property
    def steps(self) -> list[int]:
        """All step counts there are."""
        return sorted({steps for row in self.rows for steps in row.cells})

    def name_of(self, row: Row) -> str:
        """The group's label, with the role where a group has several rows."""
        several = sum(other.group is row.group for other in self.rows) > 1
        return f"{row.group.label} ({row.role})" if several else row.group.label

    def best(self, steps: int) -> list[Row]:
        """Rows with the best value at a step count, if at least two may be compared."""
        rivals = [
            row
            for row in self.rows
            if row.signature == self.common and steps in row.cells and row.cells[steps].finite
        ]
        if len(rivals) < 2:
            return []
        choose = min if self.lower else max
        record = choose(row.cells[steps].mean for row in rivals)
        return [row for row in rivals if row.cells[steps].mean == record]

    def odd_rows(self) -> list[Row]:
        """Rows measured otherwise than most."""
        return [row for row in self.rows if row.signature != self.common]

    def differences(self, row: Row) -> list[str]:
        """How a row's conditions differ from the common ones, one phrase a key."""
        usual = next(r.conditions for r in self.rows if r.signature == self.common)
        return [
            f"{key} is {_shown(row.conditions, key)}, not {_shown(usual, key)}"
            for key in sorted(usual.keys() | row.conditions.keys())
            if _shown(row.conditions, key) != _shown(usual, key)
        ]


def _shown(conditions: dict[str, Any], key: str) -> str:
    if key not in conditions:
        return "missing"
    return json.dumps(conditions[key], default=str)


def boards(groups: Sequence[Group]) -> list[Board]:
    """One board a metric. Numbers of different protocols never share a cell."""
    rows: dict[str, dict[tuple[int, str, str], Row]] = {}
    counts: dict[str, Counter[str]] = {}
    higher = set()
    for group, run, m in ((g, r, m) for g in groups for r in g.runs for m in r.measurements):
        fresh = Row(group, m.role, {"num_samples": m.num_samples, **flatten(m.protocol)})
        key = (group.position, m.role, fresh.signature)
        row = rows.setdefault(m.metric, {}).setdefault(key, fresh)
        cell = row.cells.setdefault(m.num_steps, Cell(m.network_evaluations))
        cell.by_run.setdefault(run.position, []).append(m.value)
        counts.setdefault(m.metric, Counter())[fresh.signature] += 1
        if getattr(m, "better", "lower") == "higher":
            higher.add(m.metric)  # files of earlier versions do not say
    return [
        Board(
            metric,
            sorted(rows[metric].values(), key=lambda row: not row.is_teacher),
            counts[metric].most_common(1)[0][0],
            lower=metric not in higher,
        )
        for metric in sorted(rows, key=_importance)
    ]


def _importance(metric: str) -> tuple[int, str]:
    for place, beginning in enumerate(IMPORTANT):
        if metric.startswith(beginning):
            return place, metric
    return len(IMPORTANT), metric
