"""Leaderboards: numbers side by side, and which of them may be compared."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.report.data import TEACHER_METHOD, Run, flatten

TEACHER_ROLE = "teacher"

LOWER_IS_BETTER = {"frechet_": True, "sliced_wasserstein": True}
"""Direction of a metric, by the beginning of its name."""


def lower_is_better(metric: str) -> bool | None:
    """Whether small values of a metric are good; None for a metric this table does not know."""
    for beginning, lower in LOWER_IS_BETTER.items():
        if metric.startswith(beginning):
            return lower
    return None


@dataclass(eq=False)
class Cell:
    """What one run and role scored at one step count, over the seeds of its noise."""

    evaluations: int
    values: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        if len(self.values) < 2 or not self.finite:
            return None
        return statistics.stdev(self.values)

    @property
    def finite(self) -> bool:
        """Whether every value is a number."""
        return all(math.isfinite(v) for v in self.values)


@dataclass(eq=False)
class Row:
    """One run and role under one protocol.

    Attributes:
        conditions: the protocol with the number of samples, flat; equal for comparable numbers.
        cells: by sampling step count.
    """

    run: Run
    role: str
    conditions: dict[str, Any]
    cells: dict[int, Cell] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """The conditions as one string; two rows with the same one may be compared."""
        return json.dumps(self.conditions, sort_keys=True, default=str)

    @property
    def is_teacher(self) -> bool:
        """Whether this is what students are measured against."""
        return self.role == TEACHER_ROLE or self.run.method == TEACHER_METHOD


@dataclass
class Board:
    """All rows of one metric, teachers first.

    Attributes:
        common: the signature most measurements share.
    """

    metric: str
    rows: list[Row]
    common: str

    @property
    def steps(self) -> list[int]:
        """All step counts there are."""
        return sorted({steps for row in self.rows for steps in row.cells})

    @property
    def lower(self) -> bool | None:
        """Whether small values are good, if that is known."""
        return lower_is_better(self.metric)

    def name_of(self, row: Row) -> str:
        """The run's label, with the role where a run has several rows."""
        several = sum(other.run is row.run for other in self.rows) > 1
        return f"{row.run.label} ({row.role})" if several else row.run.label

    def best(self, steps: int) -> list[Row]:
        """Rows with the best value at a step count, if at least two may be compared."""
        rivals = [
            row
            for row in self.rows
            if row.signature == self.common and steps in row.cells and row.cells[steps].finite
        ]
        if self.lower is None or len(rivals) < 2:
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


def boards(runs: Sequence[Run]) -> list[Board]:
    """One board a metric. Numbers of different protocols never share a cell."""
    rows: dict[str, dict[tuple[int, str, str], Row]] = {}
    counts: dict[str, Counter[str]] = {}
    for position, run in enumerate(runs):
        for m in run.measurements:
            fresh = Row(run, m.role, {"num_samples": m.num_samples, **flatten(m.protocol)})
            key = (position, m.role, fresh.signature)
            row = rows.setdefault(m.metric, {}).setdefault(key, fresh)
            cell = row.cells.setdefault(m.num_steps, Cell(m.network_evaluations))
            cell.values.append(m.value)
            counts.setdefault(m.metric, Counter())[fresh.signature] += 1
    return [
        Board(
            metric,
            sorted(found.values(), key=lambda row: not row.is_teacher),
            counts[metric].most_common(1)[0][0],
        )
        for metric, found in sorted(rows.items())
    ]
